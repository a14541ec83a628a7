"""Text of tokens that are still arriving."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Tokenizer(Protocol):
  """What turns tokens into text."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of tokens."""
    ...


class Text(NamedTuple):
  """How the new tokens of a prompt read."""

  tokenizer: Tokenizer | None  # None: as numbers
  prompt: tuple[int, ...]
  stops: tuple[str, ...] = ()

  def decode(self, tokens: Sequence[int]) -> str:
    """What `tokens` add to the prompt's text, up to a stop."""
    text = self._whole(tokens)
    return text[: min((text.find(stop) for stop in self.stops if stop in text), default=None)]

  def settled(self, tokens: Sequence[int]) -> str:
    """The part of `decode` that no further token changes."""
    text = self.decode(tokens).rstrip("\ufffd")  # half a character
    begun = [n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(begun, default=0)]

  def end(self, tokens: Sequence[int]) -> int | None:
    """How many of `tokens` it takes to complete a stop, None if there is none in them."""

    def stopped(count):
      text = self._whole(tokens[:count])
      return any(stop in text for stop in self.stops)

    counts = range(1, len(tokens) + 1) if stopped(len(tokens)) else ()
    return next(filter(stopped, counts), None)

  def _whole(self, tokens: Sequence[int]) -> str:
    if self.tokenizer is None:
      return " ".join(map(str, tokens))
    before = self.tokenizer.decode(self.prompt)
    return self.tokenizer.decode([*self.prompt, *tokens])[len(before) :]
