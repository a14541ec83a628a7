"""Calls of the device program: what they take along, and what their reports say.

The device runs ahead: while one call computes, the host reads the report of the call before.

    # device   call 1      call 2      call 3
    # host        report 0    report 1    report 2      dispatch 2, 3, 4 before each of them
"""

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import paged_jax
from paged_jax import attention, groups
from paged_jax.engine import sampling
from paged_jax.engine.config import Counts, EngineConfig
from paged_jax.engine.device import draws as draws_lib
from paged_jax.engine.device import program, records
from paged_jax.engine.queue import Queue
from paged_jax.engine.requests import Sample
from paged_jax.host import Manager, Ticket


class Piece(NamedTuple):
  """The next tokens of a sample's text that a call computes; none if all of them are cached."""

  sample: Sample
  num_tokens: int

  @property
  def starts(self) -> bool:
    """Whether the sample draws its first token in the same call."""
    return self.num_tokens == self.sample.unread


class Drawn(NamedTuple):
  """What a call made of a sample."""

  sample: Sample
  tokens: list[int]  # those of this call; of a beam all of its text's
  logprobs: list[float]
  ended: bool  # it, or all of its search
  broken: bool  # its logits were not numbers
  score: float = 0.0  # of a beam
  text_ended: bool = False  # of a beam: its own text does not go on


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Parts:
  """A model that is not made of arrays alone, as modules of Equinox are: the rest is compiled in."""

  arrays: tuple[Any, ...]
  rest: tuple[Any, ...] = dataclasses.field(metadata={"static": True})  # None where an array is
  structure: Any = dataclasses.field(metadata={"static": True})

  def _whole(self) -> Any:
    arrays = iter(self.arrays)
    leaves = [next(arrays) if each is None else each for each in self.rest]
    return jax.tree.unflatten(self.structure, leaves)

  def __call__(self, tokens: jax.Array, cache: Any, plan: Any) -> tuple[Any, Any]:
    """What the model computes."""
    return self._whole()(tokens, cache, plan)

  def logits(self, hidden: Any) -> jax.Array:
    """What the model makes of hidden states."""
    return self._whole().logits(hidden)


class _Call(NamedTuple):
  ticket: Ticket  # with its packed report
  like: records.Report  # what that unpacks to
  samples: dict[int, Sample]  # those that draw, by row
  num_steps: int


class Calls:
  """Calls dispatched and not yet read, and what the program keeps on the device.

  Args:
    manager: The program runs on its cache.
    model: What the program runs.
    queue: Who is in which row.
    config: Of the engine.
    counts: What is counted here, too.
  """

  def __init__(
    self, manager: Manager, model: Any, queue: Queue, config: EngineConfig, counts: Counts
  ):
    self._manager, self._model, self._queue = manager, _compilable(model), queue
    self._config, self._counts = config, counts
    self._num_rows = config.num_rows
    chosen = [
      attention.choose(config.implementation, cache.pages, cache.ledger.pages_per_row)
      for cache in groups.each(manager.cache)
    ]
    self.implementation: Any = groups.like(config.cache, chosen)
    self.vocab_size = jax.eval_shape(_probe, self._model, manager.cache).shape[1]
    self.changed: dict[int, Sample | None] = {}  # rows to edit before the next call
    self._calls: collections.deque[_Call] = collections.deque()
    # Placed for good from the start: what is placed later compiles everything again.
    self._where = groups.each(manager.cache)[0].num_free.sharding
    s = self._num_rows
    self._longest = config.capacity + 1  # text of a row
    self._rows = jax.device_put(self._row_arrays({}), self._where)
    self._past = jax.device_put(
      records.Past(
        seen=jnp.zeros((s, self.vocab_size), bool),
        texts=jnp.zeros((s, self._longest if config.drafter else 0), jnp.int32),
        logits=jnp.zeros((s, self.vocab_size), jnp.float32),
      ),
      self._where,
    )

  def __len__(self) -> int:
    return len(self._calls)

  # Dispatch

  def dispatch(self, pieces: list[Piece], prompt_size: int | None, num_steps: int) -> None:
    """Runs the program for all samples that draw, with pieces of prompts if `prompt_size` is given."""
    prompts = None if prompt_size is None else self.prompts(pieces, prompt_size)
    starting = [sample for sample, num_tokens in pieces if sample.compute(num_tokens)]
    self.changed |= {beam.row: beam for sample in starting for beam in sample.beams}
    samples = {row: sample for row, sample in self._queue.running.items() if sample.draws}
    wanted = {row: sample.sampling for row, sample in samples.items()}
    full = not all(map(draws_lib.plain, wanted.values()))
    ticket = self.run(prompts, num_steps, wanted if full else None)
    for sample in starting:
      fresh = sample.request.logits is None and not sample.tokens  # they follow the prompt itself
      if fresh and self._manager.options.prefix_cache:
        sample.request.logits = _take(self._past, np.int32(sample.row))
    for sample in samples.values():
      sample.expect(num_steps)
    searching = full and self._config.max_beams > 1
    like = _like(num_steps, self._config.width, self._num_rows, full, searching)
    self._calls.append(_Call(ticket, like, samples, num_steps))

  def run(
    self,
    prompts: records.Prompts | None,
    num_steps: int,
    wanted: Mapping[int, sampling.Sampling] | None = None,
  ) -> Ticket:
    """One call, rows that have changed edited first; its packed report is in the ticket.

    Args:
      prompts: Pieces of prompts.
      num_steps: Decode steps.
      wanted: What is asked for, by row, if that is more than to draw: then the program adjusts
        logits, searches, and reports log-probabilities.
    """
    edits, s = self._edits(), self._num_rows
    past = self._past
    if wanted is None:
      adjustments, num_beams = None, 1
      past = dataclasses.replace(past, seen=np.zeros((s, 0), bool))
    else:
      adjustments = draws_lib.adjustments(wanted, s, self.vocab_size)
      num_beams = self._config.max_beams
    ticket = self._manager.run(
      _run, self._model, self._rows, past, edits, prompts, adjustments, num_steps=num_steps,
      drafter=self._config.drafter, num_beams=num_beams, implementation=self.implementation,
    )  # fmt: skip
    self._rows, past, packed = ticket.result
    # A row that needs `seen` makes all programs full while it draws, so what others leave out is not
    # missed.
    self._past = dataclasses.replace(past, seen=self._past.seen) if wanted is None else past
    return dataclasses.replace(ticket, result=packed)

  def warm_up(self) -> None:
    """Compiles what moves texts and logits into and out of row 0, which must be idle."""
    row, past = np.int32(0), self._past
    past = _give(past, row, _take(past, row))
    self._past = _read(past, row, np.zeros(self._longest, np.int32), np.int32(0))

  def wait(self) -> None:
    """Until all that was dispatched has run."""
    jax.block_until_ready(self._rows.tokens)

  def prompts(self, pieces: list[Piece], size: int) -> records.Prompts:
    """Pieces of prompts, padded to `size` tokens."""
    s = self._num_rows
    tokens, rows, positions = np.zeros((3, size), np.int32)
    rows[:] = s
    starts, last, at = np.zeros(s, bool), np.full(s, size, np.int32), 0
    for sample, count in pieces:
      part, begin = slice(at, at + count), sample.prefilled
      tokens[part] = sample.part(begin, begin + count)
      rows[part], positions[part] = sample.row, np.arange(begin, begin + count)
      at += count
      if count == sample.unread:
        starts[[beam.row for beam in sample.beams]] = True
        last[sample.row] = at - 1 if count else size
    arrays: Any = (tokens, rows, positions, starts, last)
    return records.Prompts(*arrays)

  def _edits(self) -> records.Edits:
    """The rows whose sample has changed since the last call."""
    changed: Any = np.zeros(self._num_rows, bool)
    changed[list(self.changed)] = True
    samples = {row: x for row, x in self.changed.items() if x is not None and x.draws}
    for row, sample in samples.items():
      if self._config.drafter or sample.sampling.repetition_penalty != 1:
        tokens = np.zeros(self._longest, np.int32)
        tokens[: sample.length] = sample.text
        self._past = _read(self._past, np.int32(row), tokens, np.int32(sample.length))
      if sample.handle and sample.handle.last_logits is not None:  # all of the prompt was cached
        logits = sample.handle.last_logits
        if isinstance(logits, np.ndarray):  # they were loaded
          logits = jax.device_put(logits, self._where)
        self._past = _give(self._past, np.int32(row), logits)
        sample.handle.last_logits = None
    self.changed.clear()
    return records.Edits(changed, self._row_arrays(samples))

  def _row_arrays(self, samples: dict[int, Sample]) -> records.Rows:
    s, vocab = self._num_rows, self.vocab_size
    arrays: dict[str, Any] = dict(
      tokens=np.zeros(s, np.int32),
      remaining=np.zeros(s, np.int32),
      stop_tokens=np.full((s, 2 * sampling.MAX_STOP_TOKENS), vocab, np.int32),
      groups=np.full(s, s, np.int32),
      scores=np.zeros(s, np.float32),
    )
    for row, sample in samples.items():
      arrays["tokens"][row] = sample.part(sample.length - 1, sample.length)[0]
      arrays["remaining"][row] = 0 if sample.text_ended else sample.remaining
      ends = [*self._config.eos, *sample.sampling.stop_tokens]
      arrays["stop_tokens"][row, : len(ends)] = ends
      if sample.searching:
        arrays["groups"][row], arrays["scores"][row] = sample.beams[0].row, sample.score
    drawn = {row: (sample.sampling, sample.nth) for row, sample in samples.items()}
    return records.Rows(**arrays, draws=draws_lib.draws(drawn, s, vocab))

  # Reports

  def await_report(self) -> None:
    """Waits until the oldest report is there."""
    began = time.perf_counter()
    self._calls[0].ticket.result.block_until_ready()
    self._counts.seconds_waited += time.perf_counter() - began

  def collect(self) -> list[Drawn]:
    """Reads the oldest report."""
    call = self._calls.popleft()
    report = records.unpack(np.asarray(call.ticket.result), call.like)
    self._counts.row_steps += int((report.counts > 0).sum())
    drawn, beams = [], {}
    remaining, broken = report.remaining.tolist(), report.broken.tolist()
    texts = _texts(report.tokens, report.counts)
    logprobs = _texts(report.logprobs, report.counts) if report.logprobs.size else []
    for row, sample in call.samples.items():
      sample.report(call.num_steps)
      if sample.completion or sample.change or sample.resting:  # the host knows better
        continue
      if sample.searching:
        beams[row] = sample
        continue
      tokens, asked = texts[row], sample.sampling.logprobs is not None
      told = logprobs[row] if asked else [math.nan] * len(tokens)
      drawn.append(Drawn(sample, tokens, told, remaining[row] == 0, broken[row]))
    self._manager.settle(call.ticket)
    return drawn + _searched(report, beams)


def _compilable(model: Any) -> Any:
  """The model as an argument of a compiled program.

  Raises:
    ValueError: It has a leaf that is neither an array nor hashable.
  """
  leaves, structure = jax.tree.flatten(model)
  arrays = [hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves]
  if all(arrays):
    return model
  for leaf, is_array in zip(leaves, arrays):
    if not (is_array or isinstance(leaf, Hashable)):
      raise ValueError(
        f"model has a leaf {leaf!r}, which is neither an array nor hashable: make an array of it, or"
        " a static field"
      )
  rest = tuple(None if is_array else leaf for leaf, is_array in zip(leaves, arrays))
  return _Parts(tuple(x for x, is_array in zip(leaves, arrays) if is_array), rest, structure)


@functools.cache
def _like(
  num_steps: int, width: int, num_rows: int, with_logprobs: bool, searching: bool
) -> records.Report:
  """Shapes and dtypes of a report."""
  made = functools.partial(records.blank, num_steps, width, num_rows)
  return jax.eval_shape(lambda: made(with_logprobs=with_logprobs, searching=searching))


def _texts(values: Any, counts: Any) -> list[list]:
  """The `values` [K,W,S] of each row's new tokens, as many in each step as `counts` [K,S]."""
  taken = np.arange(values.shape[1]) < counts.T[..., None]  # [S,K,W]
  chosen = values.transpose(2, 0, 1)[taken].tolist()
  ends = counts.sum(axis=0).cumsum().tolist()
  return [chosen[begin:end] for begin, end in itertools.pairwise([0, *ends])]


def _searched(report: records.Report, beams: dict[int, Sample]) -> list[Drawn]:
  """The texts of beams, by row: at each step a row goes on with the text of its source."""
  if report.beams is None:
    return []
  begun = {row: (row, []) for row in beams}  # whose text a row goes on with, and what it adds
  for sources, counts, tokens, logprobs in zip(
    report.beams.sources, report.counts, report.tokens[:, 0], report.logprobs[:, 0]
  ):
    added = {row: [(int(tokens[row]), float(logprobs[row]))] * int(counts[row]) for row in begun}
    begun = {row: (begun[sources[row]][0], begun[sources[row]][1] + added[row]) for row in begun}
  over = {row: bool(report.remaining[row] == 0) for row in beams}
  searches: dict[int, bool] = {}  # by request: whether all its texts have ended
  for row, sample in beams.items():
    searches[id(sample.request)] = searches.get(id(sample.request), True) and over[row]
  drawn = []
  for row, sample in beams.items():
    source, new = begun[row]
    tokens, logprobs = zip(*new) if new else ((), ())
    tokens = [*beams[source].tokens, *tokens]
    logprobs = [*beams[source].logprobs, *logprobs]
    ended, broken = searches[id(sample.request)], bool(report.broken[row])
    score = float(report.beams.scores[row])
    drawn.append(Drawn(sample, tokens, logprobs, ended, broken, score, over[row]))
  return drawn


_run = jax.jit(
  program.run,
  donate_argnames=("cache", "rows", "past"),
  static_argnames=("num_steps", "drafter", "num_beams", "implementation"),
)
_read = jax.jit(program.read, donate_argnums=0)
_give = jax.jit(program.give, donate_argnums=0)
_take = jax.jit(program.take)


def _probe(model: Any, cache: Any) -> jax.Array:
  one = jnp.zeros(1, jnp.int32)
  hidden, _ = model(one, cache, paged_jax.plan(cache, one, one))
  return model.logits(hidden)
