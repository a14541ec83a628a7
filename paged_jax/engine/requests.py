"""Requests, their samples, and the five ways in which a sample changes state.

    #          begin             compute             end
    # WAITING ───────▶ READING ──────────▶ DRAWING ───────▶ ENDED
    #    ▲                │                 │    ▲
    #    └───── leave ────┴─────────────────┤    │ begin
    #                                       └────┴─ leave, its pages stay ──▶ SWAPPED
    #
    # become: a command makes something else of a sample, in any state; it may also rest

Nothing outside this file writes a field of a sample (a test checks it).
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from paged_jax.engine.sampling import Sampling
from paged_jax.engine.text import Reader, Vocabulary
from paged_jax.host import Handle


class Completion(NamedTuple):
  """One finished sample."""

  tokens: list[int]  # new ones, a stop token included
  logprobs: list[float]  # of each; NaN unless `Sampling.logprobs` asked for it; of a beam always
  reason: str  # stop, length, cancelled, error, or surplus: a beam for which there was no text
  text: str | None  # None without a tokenizer
  error: str | None = None


OnToken = Callable[[int, list[int], list[float]], None]  # sample, new tokens, their logprobs


class SequenceId(NamedTuple):
  """The manager's name for what a sample holds: a new one each time that the sample begins."""

  sample: int
  nth: int


class Body(NamedTuple):
  """What a sample holds."""

  handle: Handle | None  # None: nothing
  row: int  # -1: none
  decoding: bool  # all of its text except the last token is in the cache, or about to be
  prefilled: int  # tokens of its text in the cache or about to be, until it is decoding


NOTHING = Body(handle=None, row=-1, decoding=False, prefilled=0)


class State(enum.Enum):
  """Where a sample is."""

  WAITING = "it holds nothing, and waits for a row"
  SWAPPED = "its pages are in host memory, and it waits for a row"
  READING = "it has a row, and its prompt is computed"
  DRAWING = "it has a row, and draws tokens"
  RESTING = "it keeps what it has, and draws nothing, until a command says so"
  ENDED = "it has its completion"


@dataclasses.dataclass(eq=False, slots=True)
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
  """One continuation of a request."""

  number: int  # unique, in order of arrival
  nth: int  # of its request
  request: "Request"
  sampling: Sampling
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  origin: "Sample | None" = None  # on whose pages it can start
  branches: "list[Request]" = dataclasses.field(default_factory=list)  # forked from it
  score: float = 0.0  # of a beam
  text_ended: bool = False  # a beam's text does not go on, while others of its search do
  handle: Handle | None = None  # this and the next three: see `Body`
  row: int = -1
  decoding: bool = False
  prefilled: int = 0
  resting: bool = False  # it keeps what it has, and draws nothing
  pending: int = 0  # steps of unread calls in which it draws
  told: int = 0  # new tokens that its listener has been called with
  reader: Reader | None = None  # of the text of `tokens`, made when it is first needed
  change: Change | None = None  # for the next round to carry out
  completion: Completion | None = None

  # The five transitions

  def begin(self, body: Body) -> None:
    """It holds a row, new, back from the host, or another sample's."""
    self.handle, self.row, self.decoding, self.prefilled = body

  def compute(self, num_tokens: int) -> bool:
    """The next call computes more tokens of its text; whether these are the last, so that it draws."""
    draws = num_tokens == self.unread
    self.prefilled += num_tokens
    if draws:
      for beam in self.beams:
        beam.decoding, beam.score = True, 0.0 if beam is self else -float("inf")
    return draws

  def leave(self, *, swapped: bool = False) -> Body:
    """It has no row any more. Returns what it held.

    Args:
      swapped: Whether its pages are in host memory, and stay its own.
    """
    body = Body(self.handle, self.row, self.decoding, self.prefilled)
    self.row = -1
    if not swapped:
      self.begin(NOTHING)
    return body

  def become(self) -> Change | None:
    """It becomes what commands said, except for what it holds. Returns what they said."""
    change = self.change
    if change is not None:
      self.completion, self.reader = None, change.reader
      self.tokens, self.logprobs = change.tokens, change.logprobs
      self.sampling, self.resting = change.sampling, change.resting
      self.told = min(self.told, len(self.tokens))
      self.change = None
    return change

  def end(self, completion: Completion) -> None:
    """It draws no more."""
    self.completion = completion

  @property
  def state(self) -> State:
    """Where it is."""
    if self.completion is not None:
      return State.ENDED
    if self.resting:
      return State.RESTING
    if self.row >= 0:
      return State.DRAWING if self.decoding else State.READING
    return State.WAITING if self.handle is None else State.SWAPPED

  # Its text

  def expect(self, num_steps: int) -> None:
    """A call draws for it in so many steps."""
    self.pending += num_steps

  def report(self, num_steps: int) -> None:
    """The report of such a call is read."""
    self.pending -= num_steps

  def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
    """Tokens were drawn."""
    self.tokens += tokens
    self.logprobs += logprobs

  def search(
    self, tokens: list[int], logprobs: list[float], score: float = 0.0, *, ended: bool = False
  ) -> None:
    """A beam goes on with this text; none at first, and after its search lost its pages."""
    self.tokens, self.logprobs, self.score, self.text_ended = tokens, logprobs, score, ended

  def ask(self, **fields: Any) -> None:
    """A command: the next round gives fields of its `Change` these values."""
    if self.change is None:
      self.change = Change(
        self.tokens, self.logprobs, self.sampling, self.resting, source=self, reader=self.reader
      )
    for name, value in fields.items():
      setattr(self.change, name, value)

  def reading(self, vocabulary: Vocabulary) -> Reader:
    """What reads its text as it is, or is to be.

    Stops count in what is drawn from now on: a sample that begins with a text chose to go on from it.
    """
    now = self.change or self
    if now.reader is None:
      reader = Reader(vocabulary, self.request.prompt)
      reader.add(now.tokens)
      reader.stops = now.sampling.stop
      now.reader = reader
    return now.reader

  def news(self) -> tuple[list[int], list[float]] | None:
    """New tokens, and their logprobs, for its listener; None if there is nothing to say."""
    known = self.told
    if (self.searching or len(self.tokens) == known) and not self.completion:
      return None
    self.told = len(self.tokens)
    return self.tokens[known:], self.logprobs[known:]

  @property
  def result(self) -> Completion | None:
    """Its completion, unless a command has made it go on."""
    return None if self.change else self.completion

  @property
  def text(self) -> list[int]:
    """All tokens so far."""
    return [*self.request.prompt, *self.tokens]

  def part(self, start: int, end: int) -> list[int]:
    """Tokens `start` to `end` of its text, at the cost of these."""
    length = len(self.request.prompt)
    new = self.tokens[max(0, start - length) : max(0, end - length)]
    return [*self.request.prompt[start:end], *new]

  @property
  def length(self) -> int:
    """Tokens of its text."""
    return len(self.request.prompt) + len(self.tokens)

  @property
  def remaining(self) -> int:
    """Most tokens still to draw."""
    return self.sampling.max_new_tokens - len(self.tokens)

  def reach(self, num_tokens: int) -> int:
    """Most tokens that the cache has of its text after `num_tokens` more: the last one drawn is never
    written."""
    return self.length - 1 + min(num_tokens, self.remaining)

  # What schedulers ask

  @property
  def swapped(self) -> bool:
    """Whether its pages are in host memory."""
    return self.handle is not None and self.row < 0

  @property
  def unread(self) -> int:
    """Tokens of its text to compute before it draws."""
    return 0 if self.decoding or self.completion else self.length - self.prefilled

  @property
  def draws(self) -> bool:
    """Whether the next call may draw for it."""
    if self.state is not State.DRAWING or self.remaining <= self.pending:
      return False
    return not self.searching or all(beam.remaining > beam.pending for beam in self.beams)

  @property
  def searching(self) -> bool:
    """Whether it is one of the texts that a beam search keeps."""
    return self.sampling.num_beams > 1

  @property
  def beams(self) -> "list[Sample]":
    """Those that run only together: all of a beam search, or itself alone."""
    return self.request.samples if self.searching else [self]

  @property
  def follows(self) -> bool:
    """Whether it can start on pages that its origin is still to compute."""
    origin = self.origin
    if origin is None or self.swapped:
      return False
    return not (origin.decoding or origin.resting or origin.completion)

  @property
  def order(self) -> tuple[int, int]:
    """Samples with a smaller one come first."""
    return (-self.request.priority, self.number)


@dataclasses.dataclass(eq=False)
class Request:
  """What a user asks of the engine, and its samples."""

  prompt: Sequence[int]
  priority: int = 0
  on_token: OnToken | None = None
  beginning: tuple[int, ...] | None = None  # the first page, which alike requests could share
  samples: list[Sample] = dataclasses.field(default_factory=list)
  logits: jax.Array | None = None  # f32[V] after its prompt, for others that ask the same
  num_cached: int = 0  # tokens of its prompt that the prefix cache had
  parent: Sample | None = None  # what it was forked from

  @property
  def done(self) -> bool:
    """Whether all samples have ended."""
    return bool(self.samples) and all(sample.result for sample in self.samples)

  def rank(self, key: Callable[[Sample], float]) -> None:
    """The samples of a search that has ended come in the order of `key`."""
    self.samples = sorted(self.samples, key=key)
    for nth, sample in enumerate(self.samples):
      sample.nth = nth
