"""Prompts as text: the lines of a file, and the tokens of a text."""

import reprlib
from typing import Any


def lines(content: bytes) -> list[str]:
  """The prompts in a file, one on each line.

  A line ends with a newline, also in Windows' form, and with nothing else: form feeds and Unicode's
  separators belong to the prompt. A byte order mark does not.

  Raises:
    UnicodeDecodeError: It is not UTF-8 text.
  """
  texts = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
  return texts if texts[-1] else texts[:-1]


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
  """The tokens of a text.

  Args:
    tokenizer: One of the `tokenizers` package.
    text: An empty text has no tokens, not even the tokenizer's own.
    special_tokens: Whether the tokenizer adds its own, such as BOS. It adds them even if the text
      begins with one.

  Raises:
    ValueError: The text is not valid Unicode.
  """
  if any("\ud800" <= letter <= "\udfff" for letter in text):
    raise ValueError(f"prompt must be valid Unicode, got {reprlib.repr(text)}")
  return tuple(tokenizer.encode(text, add_special_tokens=special_tokens).ids) if text else ()
