"""Text from a decoder: requests pass through the rows of one cache, many steps per dispatch.

Axis letters: S rows, V vocabulary, B tokens in a call, K steps of a dispatch.

    # host    admit          stop, stream, admit          stop, stream
    # device  prefill, fork, decode K steps, prefill, fork, decode K steps

A request is admitted when the pool has room for all that it may come to hold, so no dispatch can
run dry. A prompt is prefilled but for its last token, which is the first that each sample decodes.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import paged_jax
from paged_jax import jitted
from paged_jax.engine import sampling
from paged_jax.engine.sampling import Sampling
from paged_jax.models.decoder import Decoder
from paged_jax.types import Cache

_PREFILL_SIZES = (32, 128, 512)  # tokens of a prefill call, padding included


def never(tokens: Sequence[int]) -> None:
  """No new tokens end a sample."""
  del tokens


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how to go on from it. Equal requests give equal texts, whatever runs beside them.

  Sample i of a request draws as the only sample of a request with seed + i would.

  Raises:
    ValueError: A field is out of range; the message names the field and its value.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int = 64
  num_samples: int = 1
  temperature: float = 0.0  # 0 = the most likely token
  top_k: int | None = None  # the most likely tokens only; None = all
  top_p: float = 1.0  # the smallest set of likely tokens with this mass; 1 = all
  seed: int = 0
  stop: Callable[[Sequence[int]], int | None] = never  # how many new tokens to keep; None = go on

  def __post_init__(self):
    limits = {
      "max_new_tokens": self.max_new_tokens >= 1,
      "num_samples": self.num_samples >= 1,
      "temperature": 0 <= self.temperature < float("inf"),
      "top_k": self.top_k is None or self.top_k >= 1,
      "top_p": 0 < self.top_p <= 1,
      "seed": 0 <= self.seed <= 2**32 - self.num_samples,
    }
    for name, ok in limits.items():
      if not ok:
        raise ValueError(f"{name} is out of range: {getattr(self, name)}")
    if not self.prompt:
      raise ValueError("prompt is empty")

  @property
  def num_tokens(self) -> int:
    """Tokens in a row at the end; the last one drawn is never written."""
    return len(self.prompt) - 1 + self.max_new_tokens


def pages_for(request: Request, page_size: int, num_samples: int | None = None) -> int:
  """Pages that so many samples of a request (all by default) come to hold at most.

  # prompt  [a][b][c .]             a and b remain shared
  # sample        [c x][d . .]      the copy of the tail and what follows are its own
  """
  shared = (len(request.prompt) - 1) // page_size
  own = -(-request.num_tokens // page_size) - shared
  return shared + own * (request.num_samples if num_samples is None else num_samples)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What each row decodes and how it draws."""

  tokens: jax.Array  # i32[S] the row's last token, not in the cache yet
  remaining: jax.Array  # i32[S] tokens still to draw, 0 = idle
  draws: sampling.Draws


class Drawn(NamedTuple):
  """What one dispatch reports."""

  tokens: jax.Array  # i32[K,S]
  ok: jax.Array  # bool[K,S] the row drew a token in that step
  remaining: jax.Array  # i32[S] tokens still to draw
  pages: jax.Array  # i32[] most pages in use at once
  unshared_pages: jax.Array  # i32[] most that would have been, had no page been shared
  copies: jax.Array  # i32[] pages copied on write


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
  decoder: Decoder, cache: Cache, tokens: jax.Array, rows: jax.Array, positions: jax.Array
) -> Cache:
  """Appends tokens i32[B] to `rows` i32[B], S for padding, at positions i32[B]."""
  num_tokens = jnp.zeros(cache.ledger.num_rows, jnp.int32).at[rows].add(1, mode="drop")
  cache, _ = paged_jax.extend(cache, num_tokens)
  _, cache = decoder(tokens, cache, paged_jax.plan(cache, rows, positions))
  return cache


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="num_steps")
def decode(
  decoder: Decoder, cache: Cache, rows: Rows, eos: jax.Array, *, num_steps: int
) -> tuple[Cache, Drawn]:
  """Draws up to `num_steps` tokens in each row, as one program.

  A row ends after its last remaining token or one of `eos` i32[E], and is freed at once. A row
  that gets no page waits for one.
  """
  s, n = cache.ledger.num_rows, cache.ledger.pool.num_pages

  def mapped(cache):
    return jnp.sum(cache.block_tables < n, dtype=jnp.int32)

  def unfinished(state):
    step, _, rows, _ = state
    return (step < num_steps) & jnp.any(rows.remaining > 0)

  def body(state):
    step, cache, rows, drawn = state
    used, entries = n - cache.num_free, mapped(cache)
    active = rows.remaining > 0
    cache, info = paged_jax.extend(cache, active.astype(jnp.int32))
    active &= info.ok
    taken, grown = n - cache.num_free - used, mapped(cache) - entries

    everyone = jnp.arange(s, dtype=jnp.int32)
    plan = paged_jax.plan(cache, jnp.where(active, everyone, s), cache.lengths - 1)
    hidden, cache = decoder(rows.tokens, cache, plan)
    new = sampling.draw(decoder.logits(hidden), rows.draws, cache.lengths)
    tokens = jnp.where(active, new, rows.tokens)
    ended = jnp.any(tokens[:, None] == eos[None], axis=1)
    remaining = jnp.where(active, jnp.where(ended, 0, rows.remaining - 1), rows.remaining)
    drawn = Drawn(
      tokens=drawn.tokens.at[step].set(tokens),
      ok=drawn.ok.at[step].set(active),
      remaining=remaining,
      pages=jnp.maximum(drawn.pages, n - cache.num_free),
      unshared_pages=jnp.maximum(drawn.unshared_pages, mapped(cache)),
      copies=drawn.copies + taken - grown,
    )
    cache, _ = paged_jax.free(cache, active & (remaining == 0))
    return step + 1, cache, dataclasses.replace(rows, tokens=tokens, remaining=remaining), drawn

  zero = jnp.zeros((), jnp.int32)
  drawn = Drawn(
    tokens=jnp.zeros((num_steps, s), jnp.int32),
    ok=jnp.zeros((num_steps, s), bool),
    remaining=rows.remaining,
    pages=zero,
    unshared_pages=zero,
    copies=zero,
  )
  _, cache, _, drawn = jax.lax.while_loop(unfinished, body, (zero, cache, rows, drawn))
  return cache, drawn


class Summary(NamedTuple):
  """What a run came to."""

  num_tokens: int = 0  # drawn
  seconds: float = 0.0  # decoding, without compilation
  pages: int = 0  # most pages in use at once
  unshared_pages: int = 0  # most that would have been, had no page been shared
  copies: int = 0  # pages copied on write

  @property
  def tokens_per_second(self) -> float:
    """Tokens drawn in all rows per second of decoding."""
    return self.num_tokens / max(self.seconds, 1e-9)

  def __str__(self) -> str:
    return (
      f"{self.num_tokens} tokens in {self.seconds:.2f} s ({self.tokens_per_second:.0f} tokens/s);"
      f" {self.pages} pages used at most, {self.unshared_pages} without sharing;"
      f" {self.copies} copied on write"
    )


class Update(NamedTuple):
  """Where a run stands. Samples are numbered prompt by prompt."""

  tokens: list[list[int]]  # all new tokens of each sample so far, an end token included
  done: list[bool]  # which samples are complete
  rows: dict[int, int]  # sample in each busy row
  cache: Cache  # valid until the next update is asked for
  summary: Summary


def generate(
  decoder: Decoder,
  cache: Cache,
  requests: Sequence[Request],
  *,
  eos: Sequence[int] = (),
  num_steps: int = 8,
) -> Update:
  """Runs all requests to their end; the last update of `stream`."""
  updates = stream(decoder, cache, requests, eos=eos, num_steps=num_steps)
  return collections.deque(updates, maxlen=1).pop()


def stream(
  decoder: Decoder,
  cache: Cache,
  requests: Sequence[Request],
  *,
  eos: Sequence[int] = (),
  num_steps: int = 8,
) -> Iterator[Update]:
  """Runs all requests in the empty rows and free pages of `cache`, in order of arrival.

  Args:
    decoder: The model.
    cache: Donated; each update has the next one.
    requests: What to generate. As many run at once as certainly fit.
    eos: Tokens that end a sample.
    num_steps: Most decode steps from one update to the next.

  Yields:
    An update when all is compiled, and after each admission and each dispatch.

  Raises:
    ValueError: A request could never run; the message says why.
  """
  vacant = np.flatnonzero(np.asarray(cache.lengths) == 0).tolist()
  batch = _Batch(requests, vacant, int(cache.num_free), cache.ledger.page_size)
  for number, request in enumerate(requests, start=1):
    _check(request, f"prompt {number}", decoder, cache, batch)
  ends, num_rows = np.array(eos, np.int32), cache.ledger.num_rows
  vocab_size = decoder.config.vocab_size
  summary = Summary()

  def update():
    tokens, done = [list(x.tokens) for x in batch.samples], [x.done for x in batch.samples]
    rows = {row: sample.index for row, sample in batch.running.items()}
    return Update(tokens, done, rows, cache, summary)

  cache, _ = decode(
    decoder, cache, _rows({}, num_rows, vocab_size), ends, num_steps=num_steps
  )  # compiles
  yield update()
  while batch.waiting or batch.running:
    if seats := batch.admit():
      cache = _begin(decoder, cache, seats)
      yield update()
    started, rows = time.perf_counter(), _rows(batch.running, num_rows, vocab_size)
    cache, drawn = decode(decoder, cache, rows, ends, num_steps=num_steps)
    drawn = jax.tree.map(np.asarray, drawn)
    summary = _add(summary, drawn, time.perf_counter() - started)
    stopped = batch.take(drawn)
    if stopped.any():
      cache, _ = jitted.free(cache, stopped)
    yield update()


@dataclasses.dataclass
class _Sample:
  """One continuation of a request."""

  index: int  # among all samples
  number: int  # of its request
  request: Request
  seed: int
  tokens: list[int] = dataclasses.field(default_factory=list)
  done: bool = False

  def row(self) -> tuple[int, int, Sampling]:
    """Its last token, how many are to come, and how they are drawn."""
    request, last = self.request, [self.request.prompt[-1], *self.tokens][-1]
    drawn = Sampling(
      temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, seed=self.seed
    )
    return last, request.max_new_tokens - len(self.tokens), drawn

  def append(self, tokens: list[int], *, ended: bool) -> None:
    """Takes what its row drew, up to where the request's `stop` cuts."""
    self.tokens += tokens
    keep = self.request.stop(self.tokens)
    if keep is not None:
      del self.tokens[keep:]
    self.done = ended or keep is not None


class _Batch:
  """Which samples wait, and which run in which row."""

  def __init__(self, requests: Sequence[Request], rows: list[int], num_pages: int, page_size: int):
    self.requests, self.rows = requests, rows
    self.num_pages, self.page_size = num_pages, page_size
    self.running: dict[int, _Sample] = {}
    self.waiting: list[list[_Sample]] = []  # one list for each request
    self.samples: list[_Sample] = []
    for number, request in enumerate(requests):
      seeds = range(request.seed, request.seed + request.num_samples)
      group = [_Sample(i, number, request, x) for i, x in enumerate(seeds, len(self.samples))]
      self.waiting.append(group)
      self.samples += group

  def admit(self) -> list[dict[int, _Sample]]:
    """Gives rows to the first requests in line that certainly fit: each one's samples by row."""
    seats = []
    while self.waiting and self._fits(self.waiting[0]):
      free = (row for row in self.rows if row not in self.running)
      seats.append(dict(zip(free, self.waiting.pop(0))))
      self.running |= seats[-1]
    return seats

  def _fits(self, group: list[_Sample]) -> bool:
    running = collections.Counter(sample.number for sample in self.running.values())
    running[group[0].number] = len(group)
    pages = sum(pages_for(self.requests[n], self.page_size, k) for n, k in running.items())
    return running.total() <= len(self.rows) and pages <= self.num_pages

  def take(self, drawn: Drawn) -> np.ndarray:
    """Hands out what was drawn; bool[S] rows that the host ends, which must be freed."""
    for row, sample in self.running.items():
      tokens = drawn.tokens[drawn.ok[:, row], row].tolist()
      sample.append(tokens, ended=bool(drawn.remaining[row] == 0))
    done = [row for row, sample in self.running.items() if sample.done]
    for row in done:
      del self.running[row]
    return np.isin(np.arange(len(drawn.remaining)), done) & (drawn.remaining > 0)


def _check(request: Request, name: str, decoder: Decoder, cache: Cache, batch: _Batch) -> None:
  """Raises ValueError if the request could not even run alone."""
  vocab_size, capacity = decoder.config.vocab_size, cache.ledger.capacity
  unknown = [token for token in request.prompt if not 0 <= token < vocab_size]
  if unknown:
    raise ValueError(f"{name} has token {unknown[0]}, but the vocabulary has {vocab_size}")
  if request.num_tokens > capacity:
    raise ValueError(f"{name} needs {request.num_tokens} tokens, but a row holds {capacity}")
  if request.num_samples > len(batch.rows):
    raise ValueError(f"{name} needs {request.num_samples} rows, but {len(batch.rows)} are free")
  needed = pages_for(request, batch.page_size)
  if needed > batch.num_pages:
    raise ValueError(f"{name} needs {needed} pages, but {batch.num_pages} are free")


def _begin(decoder: Decoder, cache: Cache, seats: list[dict[int, _Sample]]) -> Cache:
  """Prefills each group's prompt in its first row and forks it into the others."""
  s = cache.ledger.num_rows
  pieces, src, dst = [], [], []
  for group in seats:
    (first, sample), *others = group.items()
    prompt = np.array(sample.request.prompt[:-1], np.int32)
    pieces.append([prompt, np.full_like(prompt, first), np.arange(len(prompt), dtype=np.int32)])
    src += [first] * len(others)
    dst += [row for row, _ in others]
  batch = np.concatenate(pieces, axis=1)
  for start in range(0, batch.shape[1], _PREFILL_SIZES[-1]):
    part = batch[:, start : start + _PREFILL_SIZES[-1]]
    size = next(size for size in _PREFILL_SIZES if size >= part.shape[1])
    padding = np.full((3, size - part.shape[1]), s, np.int32)
    cache = prefill(decoder, cache, *np.concatenate([part, padding], axis=1))
  if dst:
    padding = [s] * (s - len(dst))
    src, dst = (np.array(rows + padding, np.int32) for rows in (src, dst))
    cache, _ = jitted.fork(cache, src, dst)
  return cache


def _rows(running: dict[int, _Sample], num_rows: int, vocab_size: int) -> Rows:
  """What each row decodes next."""
  idle = (0, 0, Sampling())
  rows = [running[row].row() if row in running else idle for row in range(num_rows)]
  tokens, remaining, drawn = zip(*rows)
  return Rows(
    tokens=jnp.array(tokens, jnp.int32),
    remaining=jnp.array(remaining, jnp.int32),
    draws=sampling.draws([(each, 0) for each in drawn], vocab_size),
  )


def _add(summary: Summary, drawn: Drawn, seconds: float) -> Summary:
  """The summary after one more dispatch."""
  return Summary(
    num_tokens=summary.num_tokens + int(drawn.ok.sum()),
    seconds=summary.seconds + seconds,
    pages=max(summary.pages, int(drawn.pages)),
    unshared_pages=max(summary.unshared_pages, int(drawn.unshared_pages)),
    copies=summary.copies + int(drawn.copies),
  )
