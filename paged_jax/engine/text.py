"""Text of tokens that are still arriving.

# tokens   [To][ be][ or][<0xE4>][<0xBD>][<0xA0>][<|end|>]
# pieces   "To" " be" " or"  ""      ""     "你"      ""       together they are the text
# stops    look at the same pieces, and at the names of special tokens, which no text shows

A token is read once, beside a few before it: what it adds does not depend on earlier ones. Characters
whose bytes have not all come, and what may be the beginning of a stop, are held back.
"""

import codecs
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not one yet
_CONTEXT = 8  # tokens that decide how the next one reads


class Tokenizer(Protocol):
  """What turns tokens into text."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of tokens."""
    ...


def numbers(tokens: Sequence[int], start: int = 0) -> list[str]:
  """The pieces of a text that shows `tokens` as numbers, from token number `start` on."""
  return [f" {token}" if nth else str(token) for nth, token in enumerate(tokens[start:], start)]


class Vocabulary:
  """What single tokens are. Made once per tokenizer, for all texts.

  Args:
    tokenizer: One of `tokenizers`, or of `transformers`, or any object that has `decode`.
  """

  def __init__(self, tokenizer: Tokenizer):
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    self.decode = tokenizer.decode
    added = getattr(tokenizer, "get_added_tokens_decoder", dict)()
    self.specials = {i: token.content for i, token in added.items() if token.special}
    find: Callable[[str], int | None] = getattr(tokenizer, "token_to_id", lambda token: None)
    ids = {find(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
    letter = find("<0x41>")
    falls_back = None not in ids and letter is not None and self.decode([letter]) == "A"
    self.bytes = ids if falls_back else {}  # byte-fallback tokens


class Reader:
  """The text of one sample.

  Args:
    vocabulary: What tokens are.
    prompt: Tokens before the first new one; their text is not part of this one.
    stops: Texts that end it, and are not part of it. The one that is complete first counts, of those
      that are complete at once the longest one.
  """

  def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int] = (), stops: Sequence[str] = ()):
    self.pieces: list[str] = []  # what each token added to the text
    self.stops = stops  # may be set, for the tokens that come
    self.done = False  # a stop is complete, or `finish` was called
    self._vocabulary = vocabulary
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # of byte-fallback tokens
    self._held, self._shown = "", ""  # may begin a stop: all of it, and "x" for what a text shows
    self._window: list[int] = []  # the last tokens that `decode` is asked about
    self._emitted = 0  # characters of the window's text that are in pieces, or held
    self._begin(prompt)

  def _begin(self, prompt: Sequence[int]) -> None:
    """The window is the end of the prompt; a character that is begun there goes on."""
    vocabulary = self._vocabulary
    shown = (token for token in reversed(prompt) if token not in vocabulary.specials)
    recent = list(itertools.islice(shown, 2 * _CONTEXT))[::-1]
    self._window = [token for token in recent if token not in vocabulary.bytes][-_CONTEXT:]
    text = vocabulary.decode(self._window)
    self._unfinished = text.endswith(_BROKEN)  # the prompt ends inside a character, or so it seems
    self._emitted, self._begun = len(text) - self._unfinished, False
    for token in recent:
      self._read(token) if token in vocabulary.bytes else self._utf8.reset()
    self._begun = bool(self._utf8.getstate()[0])  # it ends inside the bytes of a character

  @property
  def text(self) -> str:
    """The text so far, as much of it as no further token changes."""
    return "".join(self.pieces)

  def add(self, tokens: Sequence[int]) -> int | None:
    """Reads the next tokens; how many of them it takes to complete a stop, None if none is there."""
    if self.done:
      return 0
    for count, token in enumerate(tokens, start=1):
      special = self._vocabulary.specials.get(token)
      piece = self._read(token) if special is None else special
      self.pieces.append(self._released(piece, shown=special is None))
      if self.done:
        return count
    return None

  def finish(self) -> None:
    """No token comes any more: what was held back belongs to the text, broken characters too."""
    if self.done:
      return
    rest = self._characters()
    if not self._unfinished:
      rest += self._vocabulary.decode(self._window)[self._emitted :]
    self.stops = ()
    rest = self._released(rest, shown=True)
    if self.pieces:
      self.pieces[-1] += rest
    self.done = True

  def _read(self, token: int) -> str:
    """What a token adds, except a character that is not complete."""
    decode = self._vocabulary.decode
    if byte := self._vocabulary.bytes.get(token):
      if not self._window:  # the text begins here, maybe with a space that does not show
        self._window, first = [token], decode([token])
        self._emitted = len(first)
        if first != _BROKEN:
          return first
      return self._characters(byte)
    self._window.append(token)
    text = decode(self._window)
    settled = len(text) - text.endswith(_BROKEN)
    if self._unfinished and settled > self._emitted:
      self._emitted += text[self._emitted] == _BROKEN  # no new token made a character of it
      self._unfinished = False
    new = text[self._emitted : settled]
    self._emitted = max(self._emitted, settled)
    if not (new or decode([token])):
      self._window.pop()  # it reads as nothing, anywhere
      return ""
    if len(self._window) > 2 * _CONTEXT:
      self._window, pending = self._window[-_CONTEXT:], len(text) - self._emitted
      self._emitted = len(decode(self._window)) - pending
    return self._characters() + new

  def _characters(self, byte: bytes = b"") -> str:
    """Those that a byte completes; without one, those that no byte completes any more."""
    text = self._utf8.decode(byte, final=not byte)
    if self._begun and text:
      text, self._begun = text.removeprefix(_BROKEN), False  # the prompt's, not ours
    return text

  def _released(self, piece: str, *, shown: bool) -> str:
    """What can be told once `piece` has come; up to the first stop."""
    if not (self.stops or self._held):
      return piece if shown else ""
    held, mask = self._held + piece, self._shown + ("x" if shown else "-") * len(piece)
    found = [(at + len(stop), at) for stop in self.stops if (at := held.find(stop)) >= 0]
    if found:
      self.done, end = True, min(found)[1]
    else:
      end = len(held) - max((_overlap(held, stop) for stop in self.stops), default=0)
    self._held, self._shown = held[end:], mask[end:]
    return "".join(x for x, sign in zip(held[:end], mask) if sign == "x")


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of `text` that `stop` begins with."""
  counts = range(min(len(text), len(stop) - 1), 0, -1)
  return next((n for n in counts if text.endswith(stop[:n])), 0)
