"""The engine: requests in, tokens out.

One round changes who runs if there is a reason to, dispatches the next call, reads the reports that
are due, and hands out what was drawn. The device runs one call ahead: rows change hands behind the
call that it computes. Only who moves to the host, branches or gives way to somebody needs all reports
to be read first.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from paged_jax.engine import branches
from paged_jax.engine.calls import Calls, Drawn, Piece
from paged_jax.engine.options import Counts, EngineConfig
from paged_jax.engine.queue import Completion, Entry, OnToken, Queue, Sample
from paged_jax.engine.sampling import Sampling
from paged_jax.engine.scheduler import Scheduler
from paged_jax.host import Manager, Request, errors
from paged_jax.host.options import whole
from paged_jax.text import Text, Tokenizer

_log = logging.getLogger(__name__)


class Token(NamedTuple):
  """What a stream yields."""

  sample: int  # of the request
  token: int
  logprob: float


class RequestHandle:
  """A submitted request. All of this may be called from any thread."""

  def __init__(self, engine: "Engine", entry: Entry):
    self._engine, self._entry = engine, entry

  @property
  def done(self) -> bool:
    """Whether all its samples have ended."""
    return self._entry.done

  @property
  def tokens(self) -> list[list[int]]:
    """The new tokens of each sample so far; of a beam search, the texts it keeps at the moment."""
    return [list(sample.tokens) for sample in self._entry.samples]

  @property
  def completions(self) -> list[Completion | None]:
    """Of each sample, None while it goes on; of a beam search the best one first."""
    return [sample.completion for sample in self._entry.samples]

  @property
  def num_cached(self) -> int:
    """Tokens of its prompt that were not computed, because the prefix cache had them."""
    return self._entry.num_cached

  @property
  def rows(self) -> dict[int, int]:
    """Which sample is in which row, for those that run."""
    samples = list(self._entry.samples)
    return {sample.row: sample.nth for sample in samples if sample.row >= 0}

  def cancel(self) -> None:
    """Ends it before the next call; what it has drawn stays readable."""
    self._engine._command(lambda: self._engine._cancel(self._entry.samples))

  def fork(
    self, count: int, sampling: Sampling | Sequence[Sampling] | None = None
  ) -> "list[RequestHandle]":
    """Branches that start with all that this request's `tokens` are now, on the same pages.

    The request itself rests, and keeps its pages for further forks, until a branch is committed or
    it is rolled back. A branch may be forked, too.

    Args:
      count: How many.
      sampling: How each goes on, by default as the request does; `max_new_tokens` counts from the
        prompt. If one for all, branch i draws with its seed + i.

    Raises:
      ValueError: The request has several samples, or a branch could never run.
    """
    return self._engine._fork(self._entry, count, sampling)

  def rollback(self, num_tokens: int, sampling: Sampling | None = None) -> None:
    """Forgets all but the first `num_tokens` new tokens, and goes on from there.

    A request that rests, or has ended, goes on, too.

    Args:
      num_tokens: How many to keep; all of them to go on as it is.
      sampling: How to go on, by default as before: equal seeds draw the same tokens again.

    Raises:
      ValueError: The request has several samples, or fewer tokens, or could never run.
    """
    self._engine._roll_back(self._entry, num_tokens, sampling)

  def commit(self) -> None:
    """The request that this one was forked from goes on with this one's text and pages.

    This branch and the others of that request end as cancelled, unless they are done; branches of
    theirs go on by themselves.

    Raises:
      ValueError: It is no branch, or another one was committed.
    """
    self._engine._commit(self._entry)


class Engine:
  """Continuous batching for one model on one cache.

  `submit` and the methods of `RequestHandle` may be called from any thread; the rest belongs to the
  thread that calls `step` (or to the engine's own, see `start`).

  Args:
    model: A pytree; `model(tokens i32[B], cache, plan) -> (hidden [B,...], cache)` writes keys and
      values and attends by `plan`, `model.logits(hidden) -> f32[B,V]`.
    config: How to work.
    tokenizer: Needed for texts and stop strings: `decode(list of tokens) -> str`.
  """

  def __init__(self, model: Any, config: EngineConfig, *, tokenizer: Tokenizer | None = None):
    self.config, self.tokenizer = config, tokenizer
    self.manager = Manager(config.cache, config.options)
    self.counts = Counts()
    self._queue = Queue()
    self._calls = Calls(
      self.manager, model, self._queue, eos=config.eos, drafter=config.drafter,
      max_beams=config.max_beams, counts=self.counts,
    )  # fmt: skip
    self._scheduler = Scheduler(self.manager, self._queue, self._calls, config, self.counts)
    self._lock = threading.Condition()
    self._commands: list[Callable[[], None]] = []  # to be done when all reports are read
    self._arrivals: list[Entry] = []
    self._untold: dict[int, Sample] = {}  # by number: they have news for whoever listens
    self._thread: threading.Thread | None = None
    self._stopping = False
    self._failure: Exception | None = None  # of a round in the engine's own thread

  @property
  def num_copies(self) -> int:
    """Pages copied on write."""
    return self.counts.copies + self.manager.num_copies

  @property
  def vocab_size(self) -> int:
    """Tokens that the model knows, V."""
    return self._calls.vocab_size

  @property
  def num_running(self) -> int:
    """Samples on a row."""
    return len(self._queue.running)

  @property
  def num_waiting(self) -> int:
    """Samples without a row; a beam search counts as one."""
    return len(self._queue.waiting) + len(self._arrivals)

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
      on_token: Called with (sample, new tokens, their logprobs) after each round that read some,
        and when the sample has ended; of a beam search, only then.

    Raises:
      ValueError: The request could never run; the message says why.
      RuntimeError: A round has failed in the engine's own thread.
    """
    sampling = Sampling() if sampling is None else sampling
    prompt, priority = tuple(prompt), whole("priority", priority)
    self._check(prompt, sampling)
    size = self.config.cache.page_size
    beginning = prompt[:size] if len(prompt) > size else None
    entry = Entry(tuple(map(int, prompt)), priority, on_token, beginning)
    with self._lock:
      if self._failure is not None:
        raise RuntimeError("the engine has failed") from self._failure
      numbers = self._queue.numbers
      entry.samples += [Sample(next(numbers), i, entry, sampling) for i in range(sampling.width)]
      if sampling.num_beams == 1:
        for sample in entry.samples[1:]:
          sample.origin = entry.samples[0]
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
      if tokens and {*map(type, tokens)} == {int} and min(tokens) >= 0 and max(tokens) < vocab:
        continue  # what nearly all are, several times as fast
      for token in tokens:
        if not 0 <= whole(name, token) < vocab:
          raise ValueError(f"{name} has token {token}, but the vocabulary has {vocab}")
    if sampling.stop and self.tokenizer is None:
      raise ValueError(f"stop needs a tokenizer, got {sampling.stop}")
    if sampling.num_beams > self.config.max_beams:
      raise ValueError(
        f"num_beams must be at most max_beams={self.config.max_beams}, got {sampling.num_beams}"
      )
    num_tokens = len(prompt) - 1 + sampling.max_new_tokens
    capacity = config.pages_per_row * config.page_size
    if num_tokens > capacity:
      raise ValueError(f"the request needs {num_tokens} tokens, but a row holds {capacity}")
    needed = self._scheduler.most_pages(len(prompt), sampling.num_beams, num_tokens)
    if needed > config.num_pages:
      raise ValueError(f"the request needs {needed} pages, but there are {config.num_pages}")

  def _command(self, command: Callable[[], None]) -> None:
    """Something to do before the next call, when all reports have been read."""
    with self._lock:
      self._commands.append(command)
      self._lock.notify_all()

  def _cancel(self, samples: Sequence[Sample]) -> None:
    for sample in samples:
      if not sample.completion:
        self._end(sample, "cancelled")
        self._tell(sample)

  def _alone(self, entry: Entry) -> Sample:
    if len(entry.samples) > 1:
      raise ValueError(
        f"only a request with one sample has branches, this one has {len(entry.samples)}"
      )
    return entry.samples[0]

  def _fork(
    self, entry: Entry, count: int, sampling: Sampling | Sequence[Sampling] | None
  ) -> list[RequestHandle]:
    sample = self._alone(entry)
    if whole("count", count) < 1:
      raise ValueError(f"count must be at least 1, got {count}")
    if not isinstance(sampling, Sequence):
      sampling = branches.seeds(sampling or sample.sampling, count)
    if len(sampling) != count:
      raise ValueError(f"sampling must be one for each of {count} branches, got {len(sampling)}")
    num_tokens = len(sample.tokens)
    for each in sampling:
      self._check_branch(entry, num_tokens, each)
    with self._lock:
      made = branches.make(entry, num_tokens, sampling, self._queue.numbers)
      sample.resting = True  # what calls in flight draw is not taken
    self._command(lambda: branches.fork(self._scheduler, entry, num_tokens, made))
    return [RequestHandle(self, branch) for branch in made]

  def _check_branch(self, entry: Entry, num_tokens: int, sampling: Sampling) -> None:
    self._check(tuple(entry.prompt), sampling)
    if sampling.width > 1 or sampling.max_new_tokens <= num_tokens:
      raise ValueError(
        f"sampling must be of one sample with max_new_tokens above {num_tokens}, got {sampling}"
      )

  def _roll_back(self, entry: Entry, num_tokens: int, sampling: Sampling | None) -> None:
    sample = self._alone(entry)
    if not 0 <= whole("num_tokens", num_tokens) <= len(sample.tokens):
      raise ValueError(f"num_tokens must be in [0, {len(sample.tokens)}], got {num_tokens}")
    self._check_branch(entry, num_tokens, sampling or sample.sampling)
    sample.resting = True  # what calls in flight draw is not taken
    self._command(lambda: branches.roll_back(self._scheduler, sample, num_tokens, sampling))

  def _commit(self, entry: Entry) -> None:
    if entry.parent is None:
      raise ValueError("only a branch can be committed; this request was not forked")

    def commit():
      if entry.parent is not None and entry in entry.parent.branches:
        (parent,) = entry.parent.samples
        for sample in branches.commit(self._scheduler, entry):
          if sample is parent:
            self._end(sample, "stop" if sample.completion else "length")
          else:
            self._cancel([sample])
        self._tell(parent)

    self._command(commit)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
  ) -> list[list[Completion]]:
    """Runs prompts to their end; the samples of each.

    Raises:
      ValueError: A request could never run.
      OutOfPages: Pages or rows that others hold are missing.
    """
    each = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
    handles = [self.submit(*pair) for pair in zip(prompts, each, strict=True)]
    while self.step():
      pass
    if not all(handle.done for handle in handles):
      needed = self._scheduler.pages(self._queue.waiting[0].length)
      raise errors.OutOfPages(needed=needed, free=self.manager.free_pages)
    return [[done for done in handle.completions if done] for handle in handles]

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
      if completion and completion.error is not None:
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
      try:
        going = self.step()
      except Exception as error:  # whoever listens must hear of it
        _log.exception("a round failed; all requests end")
        return self._fail(error)
      if not going:
        with self._lock:
          if not (self._stopping or self._arrivals or self._commands):
            self._lock.wait(timeout=0.05 if self._queue.waiting else None)

  def _fail(self, error: Exception) -> None:
    """Every request ends, and no other is taken: nobody knows what the device holds."""
    with self._lock:
      self._failure = error
    self._take_arrivals()
    self._tell_all()
    samples = [*self._queue.running.values(), *self._queue.waiting]
    samples += [branch.samples[0] for x in samples for branch in x.entry.branches]
    for sample in samples:
      for each in sample.beams:
        if each.completion is None:
          each.completion = Completion(each.tokens, each.logprobs, "error", None, repr(error))
          self._tell(each)

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
    """Compiles everything that requests will run, and measures what preemption costs.

    Before the first request.

    Args:
      progress: Called with how many of how many programs are ready.
    """
    config = self.config
    sizes = [None, *([0] if config.options.prefix_cache else []), *config.prompt_sizes]
    searching = [False, True] if config.max_beams > 1 else [False]
    calls = [(size, beams) for beams in searching for size in sizes]
    for done, (size, beams) in enumerate(calls):
      progress(done, len(calls))
      for _ in range(2):  # the second one is timed
        began = time.perf_counter()
        prompts = None if size is None else self._calls.prompts([], size)
        self._calls.run(prompts, 1 if prompts else config.num_steps, searching=beams)
        self._calls.wait()
        if size:
          self._scheduler.prompt_seconds = (time.perf_counter() - began) / size
    self._calls.warm_up()
    self.manager.warm_up()
    if config.options.swapping and config.options.num_host_pages:
      self._time_swaps()
    progress(len(calls), len(calls))

  def _time_swaps(self) -> None:
    """Swaps a few pages out and in again, if there are any."""
    config, manager = self.config, self.manager
    count = min(4, config.options.num_host_pages, config.cache.pages_per_row, manager.free_pages)
    if not count or not manager.num_free_rows:
      return
    handle = manager.allocate(Request(self, count * config.cache.page_size))
    began = time.perf_counter()
    manager.swap_out(handle)
    manager.swap_in(handle)
    jax.block_until_ready(manager.cache)
    self._scheduler.swap_seconds = (time.perf_counter() - began) / (2 * count)
    manager.deallocate(self)

  def step(self) -> bool:
    """One round: takes in, admits, dispatches, hands out. False if there was nothing to do."""
    scheduler = self._scheduler
    commands = self._take_arrivals()
    going = any(sample.draws or sample.unread for sample in self._queue.running.values())
    read = bool(commands) or (bool(scheduler.ended) and not going)
    if read:
      self._drain()
      if commands:
        self._tell_all()
      for command in commands:
        command()
    if read or scheduler.may_admit():
      scheduler.tidy()
      if not scheduler.admit():
        self._drain()
        scheduler.tidy()
        scheduler.admit()
    pieces = scheduler.pieces()
    if not scheduler.secure(1 if pieces else self.config.num_steps):
      self._drain()
      scheduler.tidy()
      scheduler.make_room(self.config.num_steps)
      pieces = scheduler.pieces()
    dispatched = bool(pieces) or any(sample.draws for sample in self._queue.running.values())
    if dispatched:
      self._dispatch(pieces)
    behind = len(self._calls) - dispatched  # one call stays in flight
    for _ in range(behind):
      self._collect()
    self._tell_all()  # the next call computes meanwhile
    return dispatched or behind > 0 or bool(scheduler.ended) or bool(commands)

  def _take_arrivals(self) -> list[Callable[[], None]]:
    with self._lock:
      arrivals, self._arrivals = self._arrivals, []
      commands, self._commands = self._commands, []
    for entry in arrivals:
      self._queue.add(entry.samples)
    return commands

  def _dispatch(self, pieces: list[Piece]) -> None:
    total = sum(piece.num_tokens for piece in pieces)
    fits = (size for size in (0, *self.config.prompt_sizes) if size >= total)
    self._calls.dispatch(
      pieces, next(fits) if pieces else None, 1 if pieces else self.config.num_steps
    )
    self._scheduler.started(pieces)
    self.counts.calls += 1
    self.counts.prompt_tokens += total

  def _drain(self) -> None:
    while len(self._calls):
      self._collect()

  def _collect(self) -> None:
    """Reads the oldest report."""
    for drawn in self._calls.collect():
      known = len(drawn.sample.tokens)
      self._take(drawn)
      self.counts.drawn_tokens += len(drawn.sample.tokens) - known
      self._untold[drawn.sample.number] = drawn.sample

  def _take(self, drawn: Drawn) -> None:
    """A sample has what a call drew for it."""
    sample, count = drawn.sample, None
    if sample.sampling.stop:
      count = self._text(sample).end(drawn.tokens)
    sample.tokens, sample.logprobs = drawn.tokens[:count], drawn.logprobs[:count]
    if drawn.broken and (drawn.ended or not sample.searching):
      self._end(sample, "error", "the model's logits are not numbers")
    elif count is not None or drawn.ended:
      ends = (*self.config.eos, *sample.sampling.stop_tokens)
      stopped = count is not None or sample.tokens[-1] in ends
      self._end(sample, "stop" if stopped else "length")

  def _text(self, sample: Sample) -> Text:
    return Text(self.tokenizer, tuple(sample.entry.prompt[-_CONTEXT:]), sample.sampling.stop)

  def _end(self, sample: Sample, reason: str, error: str | None = None) -> None:
    """A sample has its completion; what it holds is given back soon."""
    text = None if self.tokenizer is None else self._text(sample).decode(sample.tokens)
    sample.completion = Completion(list(sample.tokens), list(sample.logprobs), reason, text, error)
    self._scheduler.end(sample)
    if sample.searching and sample.entry.done:
      sample.entry.samples.sort(key=_rank)
      for nth, beam in enumerate(sample.entry.samples):
        beam.nth = nth

  def _tell_all(self) -> None:
    """Calls back about everything that was read and not told, in order."""
    while self._untold:
      self._tell(self._untold.pop(next(iter(self._untold))))

  def _tell(self, sample: Sample) -> None:
    """Calls back about tokens that have not been told, and about the end."""
    known, on_token = sample.told, sample.entry.on_token
    if (sample.searching or len(sample.tokens) == known) and not sample.completion:
      return
    sample.told = len(sample.tokens)
    if on_token is None:
      return
    try:
      on_token(sample.nth, sample.tokens[known:], sample.logprobs[known:])
    except Exception as error:  # it is the caller's code: only its own request ends
      _log.exception("on_token of request %s raised", sample.number)
      if not sample.completion:
        self._end(sample, "error", repr(error))


_CONTEXT = 16  # tokens of the prompt that decide how the first new ones read


def _rank(beam: Sample) -> float:
  """Texts with a smaller one are better."""
  if beam.score == -np.inf:
    return np.inf
  return -beam.score / max(1, len(beam.tokens)) ** beam.sampling.length_penalty
