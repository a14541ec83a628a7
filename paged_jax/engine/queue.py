"""Requests, their samples, and who comes first."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from paged_jax.engine.sampling import Sampling
from paged_jax.host import Handle


class Completion(NamedTuple):
  """One finished sample."""

  tokens: list[int]  # new ones, a stop token included
  logprobs: list[float]  # of each under the model's own distribution
  reason: str  # stop, length, cancelled or error
  text: str | None  # None without a tokenizer
  error: str | None = None


OnToken = Callable[[int, list[int], list[float]], None]  # sample, new tokens, their logprobs


@dataclasses.dataclass(eq=False)
class Sample:
  """One continuation of a request.

  # waiting ──▶ prefilling ──▶ decoding ──▶ done
  #    ▲             │            │
  #    └── preempted, to be computed again, or swapped out and back in ──┘
  """

  number: int  # unique, in order of arrival
  nth: int  # of its request
  request: "Entry"
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  handle: Handle | None = None  # None: it holds nothing
  swapped: bool = False
  prefilled: int = 0  # tokens of `context` written or about to be
  pending: int = 0  # tokens that calls in flight may draw
  completion: Completion | None = None

  @property
  def context(self) -> list[int]:
    """All tokens so far; the last one is not in the cache yet."""
    return [*self.request.prompt, *self.tokens]

  @property
  def length(self) -> int:
    """Tokens of `context`."""
    return len(self.request.prompt) + len(self.tokens)

  @property
  def remaining(self) -> int:
    """Most tokens still to draw."""
    return self.request.sampling.max_new_tokens - len(self.tokens)

  @property
  def decoding(self) -> bool:
    """Whether its prompt is in the cache."""
    return self.handle is not None and not self.swapped and self.prefilled >= self.length - 1

  @property
  def order(self) -> tuple[int, int]:
    """Who comes first has the smaller one."""
    return (-self.request.priority, self.number)


@dataclasses.dataclass(eq=False)
class Entry:
  """A request and its samples."""

  prompt: Sequence[int]
  sampling: Sampling
  priority: int
  on_token: OnToken | None
  samples: list[Sample] = dataclasses.field(default_factory=list)

  @property
  def done(self) -> bool:
    """Whether all samples have ended."""
    return bool(self.samples) and all(sample.completion for sample in self.samples)


class Queue:
  """Samples that wait, those on rows, first come first served within a priority."""

  def __init__(self):
    self.waiting: list[Sample] = []
    self.running: dict[int, Sample] = {}  # by row
    self._numbers = itertools.count()

  def add(self, entry: Entry) -> None:
    """All samples of a request come to wait."""
    for nth in range(entry.sampling.num_samples):
      entry.samples.append(Sample(next(self._numbers), nth, entry))
    self.waiting += entry.samples
    self.waiting.sort(key=lambda sample: sample.order)

  def back(self, sample: Sample) -> None:
    """A sample waits again, where it was in line."""
    self.waiting.append(sample)
    self.waiting.sort(key=lambda sample: sample.order)

  def last(self) -> tuple[int, Sample]:
    """The row, and the sample, of whoever would be served last of those running."""
    return max(self.running.items(), key=lambda item: item[1].order)
