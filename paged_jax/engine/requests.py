"""Requests, their samples, and who comes first."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from paged_jax.engine.sampling import Sampling
from paged_jax.engine.text import Reader
from paged_jax.host import Handle


class Completion(NamedTuple):
  """One finished sample."""

  tokens: list[int]  # new ones, a stop token included
  logprobs: list[float]  # of each under the model's own distribution
  reason: str  # stop, length, cancelled, error, or surplus: a beam for which there was no text
  text: str | None  # None without a tokenizer
  error: str | None = None


OnToken = Callable[[int, list[int], list[float]], None]  # sample, new tokens, their logprobs


class SequenceId(NamedTuple):
  """The manager's name for what a sample holds: another one each time that it gets a row anew."""

  sample: int
  nth: int


class Body(NamedTuple):
  """What a sample holds."""

  handle: Handle | None
  row: int
  swapped: bool
  decoding: bool
  prefilled: int


@dataclasses.dataclass(eq=False)
class Change:
  """What commands have made of a sample, in their order. The next round carries it out; until then
  nothing that is drawn for the sample counts."""

  tokens: list[int]  # from which it goes on
  logprobs: list[float]
  sampling: Sampling
  resting: bool
  source: "Sample | None"  # on whose pages it goes on
  reader: Reader | None = None  # of the text of `tokens`
  reason: str | None = None  # why it ends, None if it does not


@dataclasses.dataclass(eq=False)
class Sample:
  """One continuation of a request.

  # waiting ──▶ reading its prompt ──▶ decoding ──▶ done
  #    ▲                │                 │
  #    └── preempted, to be computed again, or swapped out and back in
  """

  number: int  # unique, in order of arrival
  nth: int  # of its request
  entry: "Entry"
  sampling: Sampling
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  origin: "Sample | None" = None  # on whose pages it can start
  branches: "list[Entry]" = dataclasses.field(default_factory=list)  # forked from it, one to commit
  score: float = 0.0  # of a beam
  ended: bool = False  # a beam's text does not go on, while others of its search do
  handle: Handle | None = None  # None: it holds nothing
  row: int = -1  # -1: it has none
  swapped: bool = False
  resting: bool = False  # it keeps what it has, and draws nothing
  decoding: bool = False  # its text but for the last token is in the cache, or about to be
  prefilled: int = 0  # tokens of its text written or about to be, while it is not decoding
  pending: int = 0  # steps of calls in flight in which it draws
  told: int = 0  # new tokens that whoever listens has heard of
  reader: Reader | None = None  # of the text of `tokens`, made when it is first needed
  change: Change | None = None  # to be carried out by the next round
  completion: Completion | None = None

  @property
  def result(self) -> Completion | None:
    """Its completion, unless a command has made it go on."""
    return None if self.change else self.completion

  @property
  def text(self) -> list[int]:
    """All tokens so far."""
    return [*self.entry.prompt, *self.tokens]

  @property
  def length(self) -> int:
    """Tokens of its text."""
    return len(self.entry.prompt) + len(self.tokens)

  @property
  def remaining(self) -> int:
    """Most tokens still to draw."""
    return self.sampling.max_new_tokens - len(self.tokens)

  @property
  def limit(self) -> int:
    """Most tokens that it comes to hold; the last one drawn is never written."""
    return len(self.entry.prompt) - 1 + self.sampling.max_new_tokens

  @property
  def unread(self) -> int:
    """Tokens of its text that are still to be computed before it draws."""
    return 0 if self.decoding else self.length - self.prefilled

  @property
  def draws(self) -> bool:
    """Whether the next call may draw for it."""
    if not self.decoding or self.swapped or self.resting or self.completion is not None:
      return False
    if not self.searching:
      return self.remaining > self.pending
    return all(beam.remaining > self.pending for beam in self.beams)

  @property
  def searching(self) -> bool:
    """Whether it is one of the texts that a beam search keeps."""
    return self.sampling.num_beams > 1

  @property
  def beams(self) -> "list[Sample]":
    """Those that run only together: all of a beam search, or itself alone."""
    return self.entry.samples if self.searching else [self]

  @property
  def body(self) -> Body:
    """What it holds."""
    return Body(self.handle, self.row, self.swapped, self.decoding, self.prefilled)

  @body.setter
  def body(self, body: Body) -> None:
    self.handle, self.row, self.swapped, self.decoding, self.prefilled = body

  def become(self, change: Change) -> None:
    """It is what it was to be, except for what it holds."""
    self.completion, self.reader = None, change.reader
    self.tokens, self.logprobs = change.tokens, change.logprobs
    self.sampling, self.resting = change.sampling, change.resting
    self.told = min(self.told, len(self.tokens))
    self.change = None

  def let_go(self) -> None:
    """It holds nothing any more."""
    self.body = _NOTHING

  def could_share(self, origin: "Sample") -> bool:
    """Whether all of its text but the last token is on the pages of `origin`'s row."""
    shared = self.text[:-1]
    return origin.row >= 0 and origin.decoding and origin.text[:-1][: len(shared)] == shared

  @property
  def order(self) -> tuple[int, int]:
    """Who comes first has the smaller one."""
    return (-self.entry.priority, self.number)


@dataclasses.dataclass(eq=False)
class Entry:
  """A request and its samples."""

  prompt: Sequence[int]
  priority: int = 0
  on_token: OnToken | None = None
  beginning: Sequence[int] | None = None  # the first page, which alike requests could share
  samples: list[Sample] = dataclasses.field(default_factory=list)
  logits: jax.Array | None = None  # f32[V] after its prompt, for whoever asks the same
  num_cached: int = 0  # tokens of its prompt that the prefix cache had
  parent: Sample | None = None  # what it was forked from

  @property
  def done(self) -> bool:
    """Whether all samples have ended."""
    return bool(self.samples) and all(sample.result for sample in self.samples)


_NOTHING = Body(handle=None, row=-1, swapped=False, decoding=False, prefilled=0)


class Queue:
  """Samples that wait, those on rows, first come first served within a priority."""

  def __init__(self):
    self.waiting: list[Sample] = []
    self.running: dict[int, Sample] = {}  # by row
    self.numbers: Iterator[int] = itertools.count()

  def add(self, samples: Sequence[Sample]) -> None:
    """Samples come to wait, each where it is in line; beams as one, by the first of them."""
    for sample in samples:
      if sample is sample.beams[0]:
        bisect.insort(self.waiting, sample, key=lambda each: each.order)

  def remove(self, sample: Sample) -> None:
    """A sample waits no more, if it did."""
    self.waiting = [each for each in self.waiting if each is not sample]

  def last(self) -> Sample:
    """Who must yield first of those running: whoever rests, then whoever came last."""
    return max(self.running.values(), key=lambda sample: (sample.resting, sample.order))
