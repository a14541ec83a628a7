"""The engine: admits requests, dispatches the device program, and hands out what it drew.

The device runs ahead: while one call computes, the host takes in the report of the call before.
Only when the host must change who runs (admission, preemption, the end of a request) does it wait
for all calls.

    # device   call 1      call 2      call 3
    # host        report 0    report 1    report 2      dispatch 2, 3, 4 before each of them
"""

import asyncio
import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import paged_jax
from paged_jax.config import CacheConfig
from paged_jax.engine import program, sampling
from paged_jax.engine.queue import Completion, Entry, OnToken, Queue, Sample
from paged_jax.engine.sampling import Sampling
from paged_jax.host import Manager, ManagerConfig, Request, errors

_log = logging.getLogger(__name__)
PREEMPTIONS = ("auto", "swap", "recompute")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How an engine works.

  Raises:
    ValueError: A field is out of range; the message names the field and its value.
  """

  cache: CacheConfig
  options: ManagerConfig = dataclasses.field(default_factory=ManagerConfig)
  num_steps: int = 8  # decode steps of a call while no prompt waits
  prompt_sizes: tuple[int, ...] = (32, 128, 512)  # compiled; the largest is a call's budget
  eos: tuple[int, ...] = ()  # tokens that end every sample
  preemption: str = "auto"  # swap, recompute, or whichever costs less

  def __post_init__(self):
    if self.num_steps < 1:
      raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
    if not self.prompt_sizes or sorted({*self.prompt_sizes}) != [*self.prompt_sizes]:
      raise ValueError(f"prompt_sizes must ascend, got {self.prompt_sizes}")
    if self.prompt_sizes[0] < 1:
      raise ValueError(f"prompt_sizes must be positive, got {self.prompt_sizes}")
    if len(self.eos) > sampling.MAX_STOP_TOKENS:
      raise ValueError(f"eos must be at most {sampling.MAX_STOP_TOKENS} tokens, got {self.eos}")
    if self.preemption not in PREEMPTIONS:
      raise ValueError(f"preemption must be one of {PREEMPTIONS}, got {self.preemption!r}")


@dataclasses.dataclass
class Counts:
  """What an engine has done."""

  calls: int = 0
  drawn_tokens: int = 0
  prompt_tokens: int = 0  # computed
  cached_tokens: int = 0  # found in the prefix cache
  swaps: int = 0  # preemptions
  recomputations: int = 0
  peak_running: int = 0


class Token(NamedTuple):
  """What a stream yields."""

  sample: int  # of the request
  token: int
  logprob: float


class RequestHandle:
  """A submitted request."""

  def __init__(self, engine: "Engine", entry: Entry):
    self._engine, self._entry = engine, entry

  @property
  def done(self) -> bool:
    """Whether all its samples have ended."""
    return self._entry.done

  @property
  def tokens(self) -> list[list[int]]:
    """The new tokens of each sample so far."""
    return [list(sample.tokens) for sample in self._entry.samples]

  @property
  def completions(self) -> list[Completion]:
    """Those of its samples that have ended."""
    return [sample.completion for sample in self._entry.samples if sample.completion]

  def cancel(self) -> None:
    """Ends it before the next call; what it has drawn stays readable. May be called anywhere."""
    self._engine._cancel(self._entry)


class _Call(NamedTuple):
  """A dispatched program whose report has not been read."""

  report: program.Report
  rows: dict[int, tuple[Sample, int]]  # sample, and most tokens it may draw


class Engine:
  """Continuous batching for one model on one cache.

  `submit` and `RequestHandle.cancel` may be called from any thread; the rest belongs to the
  thread that calls `step` (or to the engine's own, see `stream`).

  Args:
    model: A pytree; `model(tokens i32[B], cache, plan) -> (hidden [B,...], cache)` writes keys and
      values and attends by `plan`, `model.logits(hidden) -> f32[B,V]`.
    config: How to work.
    tokenizer: Needed for texts and stop strings: `decode(list of tokens) -> str`.
    clock: Seconds.
  """

  def __init__(
    self,
    model: Any,
    config: EngineConfig,
    *,
    tokenizer: Any = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self.model, self.config, self.tokenizer = model, config, tokenizer
    self.manager = Manager(config.cache, config.options)
    self.vocab_size = jax.eval_shape(_probe, model, self.manager.cache).shape[1]
    self.counts = Counts()
    self.seconds_waited = 0.0  # for reports: what the device takes beyond the host's own work
    self._clock = clock
    self._lock = threading.Condition()
    self._arrivals: list[Entry] = []
    self._cancelled: list[Entry] = []
    self._thread: threading.Thread | None = None
    self._stopping = False
    self._queue = Queue()
    self._calls: collections.deque[_Call] = collections.deque()
    self._ended: list[tuple[int, Sample]] = []
    self._unstored: list[Sample] = []
    self._changed: dict[int, Sample | None] = {}  # rows to edit before the next call
    self._free = config.cache.num_pages
    self._swap_seconds = 0.0  # per page and way
    self._prompt_seconds = 0.0  # per token
    s = config.cache.num_rows
    self._rows = jax.device_put(self._row_arrays({}))
    self._seen = jnp.zeros((s, self.vocab_size), bool)
    self._unchanged = jax.device_put(program.Edits(jnp.zeros(s, bool), self._row_arrays({})))

  # Requests

  def submit(
    self,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    *,
    priority: int = 0,
    on_token: OnToken | None = None,
  ) -> RequestHandle:
    """A request joins the queue.

    Args:
      prompt: Tokens.
      sampling: How to go on; greedy by default.
      priority: Higher ones go first, and may preempt lower ones.
      on_token: Called with (sample, new tokens, their logprobs) after each call that drew some,
        and when the sample has ended.

    Raises:
      ValueError: The request could never run; the message says why.
    """
    sampling = Sampling() if sampling is None else sampling
    prompt = tuple(prompt)
    self._check(prompt, sampling)
    entry = Entry(tuple(map(int, prompt)), sampling, priority, on_token)
    with self._lock:
      self._arrivals.append(entry)
      self._lock.notify_all()
    return RequestHandle(self, entry)

  def _check(self, prompt: tuple, sampling: Sampling) -> None:
    config, vocab = self.config.cache, self.vocab_size
    if not prompt:
      raise ValueError("prompt is empty")
    for name, tokens in (
      ("prompt", prompt), ("logit_bias", sampling.logit_bias), ("stop_tokens", sampling.stop_tokens)
    ):  # fmt: skip
      for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
          raise ValueError(f"{name} must be tokens, got {token!r}")
        if not 0 <= token < vocab:
          raise ValueError(f"{name} has token {token}, but the vocabulary has {vocab}")
    if sampling.stop and self.tokenizer is None:
      raise ValueError(f"stop needs a tokenizer, got {sampling.stop}")
    num_tokens = len(prompt) - 1 + sampling.max_new_tokens
    capacity = config.pages_per_row * config.page_size
    if num_tokens > capacity:
      raise ValueError(f"the request needs {num_tokens} tokens, but a row holds {capacity}")
    needed = self._pages(num_tokens)
    if needed > config.num_pages:
      raise ValueError(f"the request needs {needed} pages, but there are {config.num_pages}")

  def _pages(self, num_tokens: int) -> int:
    return -(-num_tokens // self.config.cache.page_size)

  def _cancel(self, entry: Entry) -> None:
    with self._lock:
      self._cancelled.append(entry)
      self._lock.notify_all()

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
  ) -> list[list[Completion]]:
    """Runs prompts to their end; the samples of each.

    Raises:
      OutOfPages: Pages that others hold are missing.
    """
    each = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
    handles = [self.submit(*pair) for pair in zip(prompts, each, strict=True)]
    while self.step():
      pass
    if not all(handle.done for handle in handles):
      sample = self._queue.waiting[0]
      raise errors.OutOfPages(needed=self._pages(sample.length), free=self.manager.free_pages)
    return [handle.completions for handle in handles]

  # Streams

  async def stream(
    self, prompt: Sequence[int], sampling: Sampling | None = None, *, priority: int = 0
  ) -> AsyncIterator[Token]:
    """The tokens of a request as they come. Whoever stops listening cancels it.

    The engine's own thread does the steps; it starts with the first stream, see `close`.

    Raises:
      RuntimeError: The request ended in an error.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

    def on_token(nth: int, tokens: list[int], logprobs: list[float]) -> None:
      loop.call_soon_threadsafe(arrived.put_nowait, (nth, tokens, logprobs))

    handle = self.submit(prompt, sampling, priority=priority, on_token=on_token)
    self.start()
    try:
      seen = 0
      while not (handle.done and seen == sum(map(len, handle.tokens))):
        nth, tokens, logprobs = await arrived.get()
        seen += len(tokens)
        for token, logprob in zip(tokens, logprobs):
          yield Token(nth, token, logprob)
    finally:
      if not handle.done:
        handle.cancel()
    for completion in handle.completions:
      if completion.error is not None:
        raise RuntimeError(completion.error)

  def start(self) -> None:
    """Starts the engine's own thread, if it has none; it does the steps until `close`."""
    with self._lock:
      if self._thread is None:
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

  def _serve(self) -> None:
    while True:
      with self._lock:
        if self._stopping:
          return
      if not self.step():
        with self._lock:
          if not (self._stopping or self._arrivals or self._cancelled):
            self._lock.wait(timeout=0.05 if self._queue.waiting else None)

  def close(self) -> None:
    """Stops the engine's own thread, if it has one, after the round it is in."""
    with self._lock:
      thread, self._thread = self._thread, None
      self._stopping = True
      self._lock.notify_all()
    if thread is not None:
      thread.join()

  # One round

  def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Compiles every program of steady state, and measures what preemption costs.

    Args:
      progress: Called with how many of how many programs are ready.
    """
    calls = [(None, self.config.num_steps), *((size, 1) for size in self.config.prompt_sizes)]
    for done, (size, num_steps) in enumerate(calls):
      progress(done, len(calls))
      for _ in range(2):  # the second one is timed
        began = self._clock()
        self._call(None if size is None else self._prompts([], size), num_steps)
        jax.block_until_ready(self._rows.tokens)
        if size is not None:
          self._prompt_seconds = (self._clock() - began) / size
    if self.config.options.swapping and self.config.options.num_host_pages:
      count = min(4, self.config.options.num_host_pages, self.config.cache.pages_per_row,
                  self.manager.free_pages)  # fmt: skip
      for _ in range(2 if count else 0):
        handle = self.manager.allocate(Request(self, count * self.config.cache.page_size))
        began = self._clock()
        self.manager.swap_out(handle)
        self.manager.swap_in(handle)
        jax.block_until_ready(self.manager.cache)
        self._swap_seconds = (self._clock() - began) / (2 * count)
        self.manager.deallocate(self)
    self._free = self.manager.settle()
    progress(len(calls), len(calls))

  def step(self) -> bool:
    """One round: takes in, admits, dispatches, hands out. False if there was nothing to do."""
    cancelled = self._take_arrivals()
    idle = not self._decoding()
    if cancelled or self._unstored or (self._ended and idle) or self._could_admit():
      self._drain()
      self._cancel_all(cancelled)
      self._tidy()
      self._admit()
    pieces = self._pieces()
    num_steps = 1 if pieces else self.config.num_steps
    self._secure(num_steps)
    pieces = [(row, sample, n) for row, sample, n in pieces if sample.handle and not sample.swapped]
    dispatched = bool(pieces or self._decoding())
    if dispatched:
      self._dispatch(pieces, num_steps)
    behind = len(self._calls) - dispatched  # one call stays in flight
    for _ in range(behind):
      self._collect()
    return dispatched or behind > 0 or bool(self._ended)

  def _could_admit(self) -> bool:
    """Whether somebody waits, and there is a row or a lower priority to take one from."""
    if not self._queue.waiting:
      return False
    full = len(self._queue.running) == self.config.cache.num_rows
    first = self._queue.waiting[0]
    return not full or bool(self._ended) or first.order[0] < self._queue.last()[1].order[0]

  def _decoding(self) -> list[tuple[int, Sample]]:
    """Rows that the next call decodes."""
    return [
      (row, sample)
      for row, sample in self._queue.running.items()
      if sample.decoding and not sample.completion and sample.remaining > sample.pending
    ]

  def _take_arrivals(self) -> list[Entry]:
    with self._lock:
      arrivals, self._arrivals = self._arrivals, []
      cancelled, self._cancelled = self._cancelled, []
    for entry in arrivals:
      self._queue.add(entry)
    return cancelled

  def _cancel_all(self, entries: list[Entry]) -> None:
    for sample in [sample for entry in entries for sample in entry.samples]:
      if not sample.completion:
        self._end(sample, "cancelled")
        self._tell(sample, [], [])

  def _end(self, sample: Sample, reason: str, error: str | None = None) -> None:
    """A sample has its completion; what it holds is given back by `_tidy`."""
    text = None if self.tokenizer is None else self.tokenizer.decode(sample.tokens)
    if text is not None:
      found = [at for stop in sample.request.sampling.stop if (at := text.find(stop)) >= 0]
      text = text[: min(found, default=len(text))]
    sample.completion = Completion(list(sample.tokens), list(sample.logprobs), reason, text, error)
    if sample in self._queue.waiting:
      self._queue.waiting.remove(sample)
    if sample.handle is not None:
      row = next((r for r, x in self._queue.running.items() if x is sample), -1)
      self._ended.append((row, sample))

  def _tidy(self) -> None:
    """Gives back what ended samples hold, and lets others start on what is written."""
    keep = self.config.options.prefix_cache
    for row, sample in self._ended:
      assert sample.handle is not None and sample.completion is not None
      if keep and sample.decoding and row >= 0 and sample.completion.error is None:
        self.manager.store_prefix(sample.handle, sample.context[:-1])
      self.manager.deallocate(sample.handle.request_id)
      sample.handle = None
      if row >= 0:
        del self._queue.running[row]
        self._changed[row] = None
    self._ended.clear()
    for sample in self._unstored if keep else ():
      whole = (len(sample.request.prompt) - 1) // self.config.cache.page_size
      if whole and sample.handle is not None and not sample.swapped:
        tokens = sample.request.prompt[: whole * self.config.cache.page_size]
        self.manager.store_prefix(sample.handle, tokens)
    self._unstored.clear()
    self._free = self.manager.settle()

  # Who runs

  def _admit(self) -> None:
    """Rows and pages to those first in line, as long as there is room."""
    writing = {self._key(x) for x in self._queue.running.values() if not x.decoding} - {None}
    for sample in list(self._queue.waiting):
      leader = sample.request.samples[0]
      being_written = leader in self._queue.running.values() and not leader.decoding
      if not sample.swapped and (being_written or self._key(sample) in writing):
        continue  # soon its beginning can be shared
      if not self._begin(sample):
        break
      if not sample.decoding:
        writing |= {self._key(sample)} - {None}
    running = len(self._queue.running)
    self.counts.peak_running = max(self.counts.peak_running, running)

  def _key(self, sample: Sample) -> tuple[int, ...] | None:
    """What requests that begin alike have in common, if a prefix cache could tell."""
    size = self.config.cache.page_size
    if not self.config.options.prefix_cache or sample.length <= size:
      return None
    return tuple(itertools.islice(itertools.chain(sample.request.prompt, sample.tokens), size))

  def _begin(self, sample: Sample) -> bool:
    """Gives a waiting sample a row, from those behind it if need be; whether it could."""
    while True:
      try:
        self._place(sample)
        break
      except (errors.OutOfPages, errors.OutOfRows):
        if not self._queue.running:
          if not self._drop_swapped(sample):
            return False
          continue
        row, victim = self._queue.last()
        if victim.order[0] <= sample.order[0]:
          return False
        self._preempt(row, victim)
    self._queue.waiting.remove(sample)
    self._free = self.manager.settle()
    return True

  def _place(self, sample: Sample) -> None:
    """A row and pages for what the sample already has, if there is room for its next call, too."""
    leader = sample.request.samples[0]
    if sample.swapped and sample.handle is not None:
      self._check_room(self._pages(sample.length + self.config.num_steps))
      self.manager.swap_in(sample.handle)
      sample.swapped = False
    elif sample is not leader and not sample.tokens and leader.decoding:
      assert leader.handle is not None
      self._check_room(self._pages(self.config.num_steps) + 1)
      sample.handle = self.manager.clone(leader.handle, sample.number)
      sample.prefilled = len(sample.request.prompt) - 1
      self.manager.trim(sample.handle, sample.prefilled)
    else:
      context = np.array(sample.context, np.int32)
      sample.handle = self.manager.allocate(
        Request(sample.number, tokens=context, initial_tokens=len(context) - 1)
      )
      sample.prefilled = sample.handle.num_cached
      try:
        self._check_room(self._pages(self.config.num_steps))
      except errors.OutOfPages:
        self.manager.deallocate(sample.number)
        sample.handle, sample.prefilled = None, 0
        raise
      self.counts.cached_tokens += sample.prefilled
    row = sample.handle.row
    self._queue.running[row] = sample
    self._changed[row] = sample

  def _check_room(self, needed: int) -> None:
    """Raises unless that many pages, and what the running samples may take, are to be had."""
    needed += self._growth(self.config.num_steps)
    if self._queue.running and self.manager.settle() < needed:
      free = self.manager.free_pages
      if free < needed:
        raise errors.OutOfPages(needed=needed, free=free)

  def _drop_swapped(self, but: Sample) -> bool:
    """Turns some swapped sample into one to compute again, so that its pages come free."""
    swapped = [x for x in self._queue.waiting if x.swapped and x is not but]
    if not swapped:
      return False
    self._forget(max(swapped, key=lambda sample: sample.order))
    return True

  def _forget(self, sample: Sample) -> None:
    assert sample.handle is not None
    self.manager.deallocate(sample.handle.request_id)
    sample.handle, sample.swapped, sample.prefilled = None, False, 0
    self.counts.recomputations += 1

  def _preempt(self, row: int, sample: Sample) -> None:
    """Takes a sample's row and pages; all calls have been read."""
    del self._queue.running[row]
    self._changed[row] = None
    if sample in self._unstored:
      self._unstored.remove(sample)
    if not (sample.decoding and self._swaps(sample) and self._swap_out(sample)):
      self._forget(sample)
    self._queue.back(sample)

  def _swaps(self, sample: Sample) -> bool:
    choice = self.config.preemption
    if choice == "auto":
      swap = 2 * self._pages(sample.length - 1) * self._swap_seconds
      choice = "swap" if swap <= (sample.length - 1) * self._prompt_seconds else "recompute"
    return choice == "swap" and self.config.options.swapping

  def _swap_out(self, sample: Sample) -> bool:
    assert sample.handle is not None
    try:
      self.manager.swap_out(sample.handle)
    except errors.OutOfHostPages:
      return False
    sample.swapped = True
    self.counts.swaps += 1
    return True

  def _growth(self, num_steps: int) -> int:
    """Pages that the running samples may take in a call of so many steps, and in those in flight."""
    pages = 0
    for sample in self._queue.running.values():
      if sample.completion or sample.handle is None:
        continue
      limit = len(sample.request.prompt) - 1 + sample.request.sampling.max_new_tokens
      most = min(sample.length - 1 + sample.pending + num_steps, limit)
      shared = sample.request.sampling.num_samples > 1 and not sample.tokens
      pages += self._pages(most) - self._pages(sample.length - 1) + shared
    return pages

  def _secure(self, num_steps: int) -> None:
    """Sees to it that the next call finds its pages: evicts prefixes, then preempts."""
    if self._growth(num_steps) <= self._free:
      return
    self._drain()
    self._tidy()
    while (needed := self._growth(num_steps)) > self._free and self._queue.running:
      self.manager.gc(needed)
      self._free = self.manager.settle()
      if needed > self._free:
        self._preempt(*self._queue.last())
        self._free = self.manager.settle()

  # Calls

  def _pieces(self) -> list[tuple[int, Sample, int]]:
    """Row, sample and number of tokens of the prompts that the next call computes."""
    budget, pieces = self.config.prompt_sizes[-1], []
    for row, sample in sorted(self._queue.running.items(), key=lambda item: item[1].order):
      wanted = min(budget, sample.length - 1 - sample.prefilled)
      if wanted > 0 and not sample.completion:
        pieces.append((row, sample, wanted))
        budget -= wanted
    return pieces

  def _dispatch(self, pieces: list[tuple[int, Sample, int]], num_steps: int) -> None:
    decoding = self._decoding()
    prompts = self._prompts(pieces) if pieces else None
    for row, sample, count in pieces:
      sample.prefilled += count
      if sample.decoding:
        self._changed[row] = sample
        self._unstored += [sample] if not sample.tokens else []
        decoding.append((row, sample))
    report = self._call(prompts, num_steps)
    rows = {}
    for row, sample in decoding:
      rows[row] = (sample, min(num_steps, sample.remaining - sample.pending))
      sample.pending += rows[row][1]
    self._calls.append(_Call(report, rows))
    self.counts.calls += 1
    self.counts.prompt_tokens += sum(count for *_, count in pieces)

  def _call(self, prompts: program.Prompts | None, num_steps: int) -> program.Report:
    edits = self._edits() if self._changed else self._unchanged
    self._rows, self._seen, report = self.manager.run(
      _run, self.model, self._rows, self._seen, edits, prompts, num_steps=num_steps
    )
    return report

  def _prompts(
    self, pieces: list[tuple[int, Sample, int]], size: int | None = None
  ) -> program.Prompts:
    s, total = self.config.cache.num_rows, sum(count for *_, count in pieces)
    if size is None:
      size = next(size for size in self.config.prompt_sizes if size >= total)
    tokens, rows, positions = (
      np.zeros(size, np.int32),
      np.full(size, s, np.int32),
      np.zeros(size, np.int32),
    )
    last, at = np.zeros(s, bool), 0
    for row, sample, count in pieces:
      part, begin = slice(at, at + count), sample.prefilled
      tokens[part] = sample.context[begin : begin + count]
      rows[part], positions[part] = row, np.arange(begin, begin + count)
      last[row] = begin + count == sample.length - 1
      at += count
    return program.Prompts(*map(jnp.asarray, (tokens, rows, positions, last)))

  def _edits(self) -> program.Edits:
    """The rows whose sample has changed since the last call."""
    changed = np.zeros(self.config.cache.num_rows, bool)
    changed[list(self._changed)] = True
    samples = {row: x for row, x in self._changed.items() if x is not None and x.decoding}
    edits = program.Edits(jnp.asarray(changed), self._row_arrays(samples))
    for row, sample in samples.items():
      if sample.request.sampling.repetition_penalty != 1:
        width = self.config.cache.pages_per_row * self.config.cache.page_size + 1
        tokens = np.full(width, self.vocab_size, np.int32)
        tokens[: sample.length] = sample.context
        self._seen = _mark(self._seen, np.int32(row), tokens)
    self._changed.clear()
    return edits

  def _row_arrays(self, samples: dict[int, Sample]) -> program.Rows:
    s, vocab = self.config.cache.num_rows, self.vocab_size
    stops = np.full((s, 2 * sampling.MAX_STOP_TOKENS), vocab, np.int32)
    tokens, remaining = np.zeros(s, np.int32), np.zeros(s, np.int32)
    drawn = [(_IDLE, 0)] * s
    for row, sample in samples.items():
      wanted = sample.request.sampling
      tokens[row], remaining[row] = sample.context[-1], sample.remaining
      ends = [*self.config.eos, *wanted.stop_tokens]
      stops[row, : len(ends)] = ends
      drawn[row] = (wanted, sample.nth)
    return program.Rows(
      tokens=jnp.asarray(tokens),
      remaining=jnp.asarray(remaining),
      stop_tokens=jnp.asarray(stops),
      draws=sampling.draws(drawn, vocab),
    )

  def _drain(self) -> None:
    while self._calls:
      self._collect()

  def _collect(self) -> None:
    """Reads the oldest report and hands out its tokens."""
    call = self._calls.popleft()
    began = self._clock()
    report = jax.device_get(call.report)
    self.seconds_waited += self._clock() - began
    self._free = self.manager.settle(programs=1)
    told = []
    for row, (sample, most) in call.rows.items():
      sample.pending -= most
      if sample.completion:
        continue  # ended by the host meanwhile
      drawn = report.drawn[:, row]
      new = report.tokens[drawn, row].tolist()
      logprobs = report.logprobs[drawn, row].tolist()
      new, stopped = self._cut(sample, new)
      sample.tokens += new
      sample.logprobs += logprobs[: len(new)]
      sample.prefilled = sample.length - 1
      self.counts.drawn_tokens += len(new)
      told.append((sample, new, logprobs[: len(new)]))
      if report.broken[row]:
        self._end(sample, "error", "the model's logits are not numbers")
      elif stopped or report.remaining[row] == 0:
        ends = {*self.config.eos, *sample.request.sampling.stop_tokens}
        stopped = stopped or sample.context[-1] in ends
        self._end(sample, "stop" if stopped else "length")
    for sample, new, logprobs in told:
      self._tell(sample, new, logprobs)

  def _cut(self, sample: Sample, new: list[int]) -> tuple[list[int], bool]:
    """The new tokens up to the one that completes a stop string, and whether one does."""
    stop = sample.request.sampling.stop
    for count in range(1, len(new) + 1 if stop else 0):
      text = self.tokenizer.decode([*sample.tokens, *new[:count]])
      if any(each in text for each in stop):
        return new[:count], True
    return new, False

  def _tell(self, sample: Sample, new: list[int], logprobs: list[float]) -> None:
    if sample.request.on_token is None or not (new or sample.completion):
      return
    try:
      sample.request.on_token(sample.nth, new, logprobs)
    except Exception as error:  # it is the caller's code: only its own request ends
      _log.exception("on_token of request %s raised", sample.number)
      if not sample.completion:
        self._end(sample, "error", repr(error))


_run = jax.jit(program.run, donate_argnames=("cache", "rows", "seen"), static_argnames="num_steps")
_mark = jax.jit(program.mark, donate_argnums=0)
_IDLE = Sampling()


def _probe(model: Any, cache: paged_jax.Cache) -> jax.Array:
  one = jnp.zeros(1, jnp.int32)
  hidden, _ = model(one, cache, paged_jax.plan(cache, one, one))
  return model.logits(hidden)
