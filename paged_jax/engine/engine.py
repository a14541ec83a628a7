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
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from paged_jax import interrupts
from paged_jax.engine import audit, branches
from paged_jax.engine.audit import EngineAudit
from paged_jax.engine.calls import Calls, Drawn, Piece
from paged_jax.engine.config import Counts, EngineConfig
from paged_jax.engine.handle import RequestHandle
from paged_jax.engine.requests import Completion, Entry, OnToken, Queue, Sample
from paged_jax.engine.sampling import Sampling
from paged_jax.engine.scheduler import Scheduler
from paged_jax.engine.text import Reader, Tokenizer, Vocabulary, numbers
from paged_jax.host import Manager, Request
from paged_jax.host.config import whole

_log = logging.getLogger(__name__)


class Token(NamedTuple):
  """What a stream yields."""

  sample: int  # of the request
  token: int
  logprob: float
  text: str  # what it added to the sample's text, see `RequestHandle.pieces`


class Engine:
  """Continuous batching for one model on one cache.

  Safe to call from several threads: rounds take turns, whoever asks for them, an own thread (see
  `start`) included. A context manager that closes it.

  Args:
    model: A pytree; `model(tokens i32[B], cache, plan) -> (hidden [B,...], cache)` writes keys and
      values and attends by `plan`, `model.logits(hidden) -> f32[B,V]`. What is no array in it is
      compiled in, and must be hashable.
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
    self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    # Guards what any thread may do: arrivals, changes, and taking what was drawn into samples.
    self._lock = threading.RLock()
    self._arrivals: list[Entry] = []
    self._changed: dict[int, Sample] = {}  # by number: they have a change to be carried out
    self._live: dict[int, Sample] = {}  # by number: they have not ended
    self._untold: dict[int, Sample] = {}  # by number: they have news for whoever listens
    self._turn = threading.RLock()  # one round at a time; taken before `_lock`
    self._in_round = False
    self._thread: threading.Thread | None = None
    self._wake = threading.Event()  # the thread may have something to do
    self._closed = False
    self._failure: BaseException | None = None  # of a round

  def __enter__(self) -> "Engine":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  @property
  def failure(self) -> BaseException | None:
    """What a round has failed with: all requests have ended, and no other is taken."""
    return self._failure

  @property
  def closed(self) -> bool:
    """Whether it has been closed."""
    return self._closed

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
      RuntimeError: The engine has failed, or is closed.
    """
    sampling = Sampling() if sampling is None else sampling
    prompt, priority = tuple(prompt), whole("priority", priority)
    self._check(prompt, sampling)
    size = self.config.cache.page_size
    beginning = prompt[:size] if len(prompt) > size else None
    entry = Entry(tuple(map(int, prompt)), priority, on_token, beginning)
    with self._lock:
      self._check_open()
      numbers = self._queue.numbers
      entry.samples += [Sample(next(numbers), i, entry, sampling) for i in range(sampling.width)]
      if sampling.num_beams == 1:
        for sample in entry.samples[1:]:
          sample.origin = entry.samples[0]
      return self._arrive(entry)

  def _arrive(self, entry: Entry) -> RequestHandle:
    self._arrivals.append(entry)
    self._live |= {sample.number: sample for sample in entry.samples}
    self._wake.set()
    return RequestHandle(self, entry)

  def _check_open(self) -> None:
    if self._failure is not None:
      raise RuntimeError(f"the engine has failed: {self._failure!r}") from self._failure
    if self._closed:
      raise RuntimeError("the engine is closed")

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
    if num_tokens > config.max_length:
      raise ValueError(
        f"the request needs {num_tokens} tokens, but a row holds {config.max_length}"
      )
    needed = self._scheduler.most_pages(len(prompt), sampling.num_beams, num_tokens)
    if needed > config.num_pages:
      raise ValueError(f"the request needs {needed} pages, but there are {config.num_pages}")

  # Commands

  def _change(self, samples: Iterable[Sample]) -> None:
    """The next round carries out the changes of these samples."""
    changed = {sample.number: sample for sample in samples}
    self._changed |= changed
    self._live |= changed
    self._wake.set()

  def _cancel(self, entry: Entry) -> None:
    with self._lock:
      self._change(branches.cancel(entry.samples))

  def _sample(self, entry: Entry, nth: int | None) -> Sample:
    """The sample of a request that a command is about."""
    samples = entry.samples
    if nth is None and len(samples) > 1:
      raise ValueError(f"the request has {len(samples)} samples: say which with `sample`")
    if not 0 <= whole("sample", nth or 0) < len(samples):
      raise ValueError(f"sample must be in [0, {len(samples)}), got {nth}")
    if samples[nth or 0].searching:
      raise ValueError("a beam can neither be forked nor rolled back")
    return samples[nth or 0]

  def _fork(
    self,
    entry: Entry,
    count: int,
    sampling: Sampling | Sequence[Sampling] | None,
    nth: int | None,
  ) -> list[RequestHandle]:
    if whole("count", count) < 1:
      raise ValueError(f"count must be at least 1, got {count}")
    with self._lock:
      self._check_open()
      sample = self._sample(entry, nth)
      if not isinstance(sampling, Sequence):
        sampling = branches.seeds(sampling or branches.alone(sample), count)
      if len(sampling) != count:
        raise ValueError(f"sampling must be one for each of {count} branches, got {len(sampling)}")
      for each in sampling:
        self._check_branch(entry, len((sample.change or sample).tokens), each)
      made = branches.fork(sample, sampling, self._queue.numbers)
      self._change([sample])
      return [self._arrive(branch) for branch in made]

  def _check_branch(self, entry: Entry, num_tokens: int, sampling: Sampling) -> None:
    self._check(tuple(entry.prompt), sampling)
    if sampling.width > 1 or sampling.max_new_tokens <= num_tokens:
      raise ValueError(
        f"sampling must be of one sample with max_new_tokens above {num_tokens}, got {sampling}"
      )

  def _roll_back(
    self, entry: Entry, num_tokens: int, sampling: Sampling | None, nth: int | None
  ) -> None:
    with self._lock:
      self._check_open()
      sample = self._sample(entry, nth)
      known = len((sample.change or sample).tokens)
      if not 0 <= whole("num_tokens", num_tokens) <= known:
        raise ValueError(f"num_tokens must be in [0, {known}], got {num_tokens}")
      if sampling is not None and sampling.seed + sample.nth >= 2**32:
        raise ValueError(f"seed is out of range for sample {sample.nth}: {sampling.seed}")
      self._check_branch(entry, num_tokens, sampling or branches.alone(sample))
      branches.roll_back(sample, num_tokens, sampling or (sample.change or sample).sampling)
      self._change([sample])

  def _commit(self, entry: Entry) -> None:
    with self._lock:
      self._check_open()
      if entry.parent is None:
        raise ValueError("only a branch can be committed; this request was not forked")
      if entry not in entry.parent.branches:
        raise ValueError("a branch of this one's parent has been committed already")
      self._change(branches.commit(entry, entry.parent))

  def _carry_out(self) -> None:
    """Makes of all changed samples what commands said; all reports have been read."""
    with self._lock:
      self._take_arrivals()  # the changed ones among them must be in the queue
      changed = [(sample, sample.change) for sample in self._changed.values() if sample.change]
      self._changed.clear()
      for sample, now in changed:
        sample.become(now)
        self._live[sample.number] = self._untold[sample.number] = sample
    branches.apply(self._scheduler, changed)
    with self._lock:
      for sample, now in changed:
        if now.reason is not None:
          self._end(sample, now.reason)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
  ) -> list[list[Completion]]:
    """Runs prompts to their end; the samples of each.

    Raises:
      ValueError: A request could never run.
      OutOfPages, OutOfRows: What others hold is missing; the requests wait.
      RuntimeError: The engine has failed, or is closed.
    """
    each = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
    handles: list[RequestHandle] = []
    try:
      for pair in zip(prompts, each, strict=True):
        handles.append(self.submit(*pair))
    except ValueError:
      for handle in handles:
        handle.cancel()
      raise
    try:
      while self.step():
        if all(handle.done for handle in handles) and self._live:
          break  # others go on
    except KeyboardInterrupt:
      for handle in handles:
        handle.cancel()
      raise
    if not all(handle.done for handle in handles):
      raise self._scheduler.refusal or RuntimeError("requests wait, and no round can serve them")
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
      known = [0] * len(handle.completions)  # tokens of each sample
      while not (handle.done and known == list(map(len, handle.tokens))):
        nth, tokens, logprobs = await arrived.get()
        pieces = handle.pieces(nth, known[nth])
        known[nth] += len(tokens)
        for token, logprob, piece in zip(tokens, logprobs, pieces):
          yield Token(nth, token, logprob, piece)
    finally:
      if not handle.done:
        handle.cancel()
    for completion in handle.completions:
      if completion and completion.error is not None:
        raise RuntimeError(completion.error)

  def start(self) -> None:
    """Starts the engine's own thread, if it has none; it does the rounds until `close`."""
    with self._lock:
      self._check_open()
      if self._thread is None:
        args = (weakref.ref(self), self._wake)
        self._thread = threading.Thread(target=_serve, args=args, name="engine", daemon=True)
        self._thread.start()

  def _turned(self) -> float | None:
    """One round in the own thread: most seconds until the next, None if there is to be none."""
    if self._closed or self._failure:
      return None
    try:
      going = self.step()
    except BaseException as error:
      _log.exception("a round failed; all requests end")
      if self._failure is None:
        self._fail(error)
      return None
    if going:
      return 0
    waits = any(not sample.resting for sample in self._queue.waiting)
    return 0.05 if waits else 1  # somebody else may give back what it needs

  def _fail(self, error: BaseException) -> None:
    """Every request ends, and no other is taken."""
    self._failure = error
    self._end_all(repr(error))

  def _end_all(self, error: str) -> None:
    """Every request ends with an error."""
    with self._lock:
      self._arrivals, self._changed = [], {}
      self._end_with(error, list(self._live.values()))
    self._tell_all()

  def _end_with(self, error: str, samples: Iterable[Sample]) -> None:
    """Those of `samples` that have not ended, and those that a command has made go on, do so."""
    with self._lock:
      for sample in samples:
        if sample.change is not None:
          sample.become(sample.change)
        if sample.completion is None:
          self._end(sample, "error", error)
          self._untold[sample.number] = sample

  def close(self) -> None:
    """Stops the own thread, if there is one, after the round that is under way. What has not ended
    ends with an error, and no request is taken any more."""
    with self._lock:
      thread, self._thread, self._closed = self._thread, None, True
      self._wake.set()
    with self._turn:
      if self._in_round:
        return  # by `on_token`: the round does the rest
      self._shut()
    if thread is not None:
      thread.join()

  def _shut(self) -> None:
    """Ends what has not ended, and gives back what is held."""
    try:
      if self._failure is None:
        self._drain()
    except Exception as error:  # the device is gone, maybe
      self._failure = error
    self._end_all("the engine was closed")
    if self._failure is None:
      self._scheduler.tidy()
    self.manager.close()

  def audit(self) -> EngineAudit:
    """Reconciles requests, samples, rows and the manager. Reads the device, between rounds."""
    with self._turn, self._lock:
      coming = {sample for entry in self._arrivals for sample in entry.samples}
      coming |= {*self._changed.values()}
      return audit.reconcile(self._scheduler, self._live.values(), coming)

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
    count = min(
      4, config.options.num_host_pages, config.cache.pages_per_row, manager.available_pages
    )
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
    """One round: takes in, admits, dispatches, hands out. False if there was nothing to do.

    Raises:
      RuntimeError: The engine has failed, or `step` is called from within a round.
    """
    with self._turn:
      if self._closed:
        return False
      self._check_open()
      if self._in_round:
        raise RuntimeError("step must not be called from within a round, as on_token is")
      with interrupts.held_back():
        return self._whole_round()

  def _whole_round(self) -> bool:
    self._in_round = True
    try:
      return self._round()
    except BaseException as error:  # nobody knows what the device holds
      self._fail(error)
      raise
    finally:
      self._in_round = False
      if self._closed:
        self._shut()

  def _round(self) -> bool:
    scheduler, flying = self._scheduler, len(self._calls)
    changed = self._take_arrivals()
    going = any(sample.draws or sample.unread for sample in self._queue.running.values())
    read = changed or (bool(scheduler.ended) and not going)
    if read:
      self._drain()
    if changed:
      self._tell_all()  # what was drawn before the commands
      self._carry_out()
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
      if stuck := scheduler.make_room(self.config.num_steps):
        self._end_with(str(stuck[1]), stuck[0].beams)
      pieces = scheduler.pieces()
    dispatched = bool(pieces) or any(sample.draws for sample in self._queue.running.values())
    if dispatched:
      self._dispatch(pieces)
    behind = len(self._calls) - dispatched  # one call stays in flight
    for _ in range(behind):
      self._collect()
    self._tell_all()  # the next call computes meanwhile
    return dispatched or flying > 0 or bool(scheduler.ended) or changed

  def _take_arrivals(self) -> bool:
    """Puts what has arrived into the queue; whether there are changes to carry out."""
    with self._lock:
      for entry in self._arrivals:
        self._queue.add(entry.samples)
      self._arrivals = []
      return bool(self._changed)

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
    self._calls.await_report()
    collected = self._calls.collect()
    with self._lock:
      for drawn in collected:
        known = len(drawn.sample.tokens)
        self._take(drawn)
        self.counts.drawn_tokens += len(drawn.sample.tokens) - known
        self._untold[drawn.sample.number] = drawn.sample

  def _take(self, drawn: Drawn) -> None:
    """A sample has what a call drew for it, unless a command has come meanwhile."""
    sample = drawn.sample
    if sample.change is not None:
      return
    if sample.searching:
      sample.tokens, sample.logprobs = drawn.tokens, drawn.logprobs
      if drawn.ended:
        self._end_beam(sample)
    elif drawn.broken:
      self._add(sample, drawn)
      self._end(sample, "error", _NOT_NUMBERS)
    elif self._add(sample, drawn):
      self._end(sample, "stop")
    elif drawn.ended:
      self._end(sample, "stop" if self._stops(sample) else "length")

  def _add(self, sample: Sample, drawn: Drawn) -> bool:
    """Adds what was drawn, up to a stop; whether there is one."""
    reader, count = self._reader(sample), None
    if reader is not None:
      count = reader.add(drawn.tokens)
    sample.tokens += drawn.tokens[:count]
    sample.logprobs += drawn.logprobs[:count]
    return count is not None

  def _reader(self, sample: Sample) -> Reader | None:
    """What reads the text of a sample as it is, or is to be; None without a tokenizer.

    Stops count in what is drawn from now on: those who begin with a text chose to go on from it.
    """
    now = sample.change or sample
    if now.reader is None and self._vocabulary is not None:
      reader = Reader(self._vocabulary, sample.entry.prompt)
      reader.add(now.tokens)
      reader.stops = now.sampling.stop
      now.reader = reader
    return now.reader

  def _pieces(self, sample: Sample, start: int) -> list[str]:
    with self._lock:
      now = sample.change or sample
      if self._vocabulary is None:
        return [] if sample.searching and not sample.completion else numbers(now.tokens, start)
      if now.reader is None and (sample.searching or self._failure):
        return []  # beams have no text yet; and reading may have been the failure
      reader = self._reader(sample)
      return [] if reader is None else reader.pieces[start:]

  def _stops(self, sample: Sample) -> bool:
    """Whether the last token is one that ends the sample."""
    return sample.tokens[-1] in (*self.config.eos, *sample.sampling.stop_tokens)

  def _end_beam(self, beam: Sample) -> None:
    """A search has ended, and one of its texts with it."""
    if beam.score > -np.inf:
      self._end(beam, "stop" if self._stops(beam) else "length")
    elif any(other.score > -np.inf for other in beam.beams):
      beam.tokens, beam.logprobs = [], []
      self._end(beam, "surplus")
    else:
      self._end(beam, "error", _NOT_NUMBERS)

  def _end(self, sample: Sample, reason: str, error: str | None = None) -> None:
    """A sample has its completion; what it holds is given back soon."""
    # After an error nothing is read: reading may have been the error.
    reader = self._reader(sample) if error is None else sample.reader
    if reader is not None and reason in ("stop", "length"):
      reader.finish()  # otherwise the text stays as the listener has it
    text = None if reader is None else reader.text
    sample.completion = Completion(list(sample.tokens), list(sample.logprobs), reason, text, error)
    self._live.pop(sample.number, None)
    self._scheduler.end(sample)
    if sample.searching and sample.entry.done:
      sample.entry.samples = sorted(sample.entry.samples, key=_rank)
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
      self._end_with(repr(error), sample.entry.samples)


_NOT_NUMBERS = "the model's logits are not numbers"


def _serve(engine: "weakref.ref[Engine]", wake: threading.Event) -> None:
  """The rounds of an engine, as long as anybody has it."""
  while (there := engine()) is not None:
    seconds = there._turned()
    del there
    if seconds is None:
      return
    if wake.wait(seconds):
      wake.clear()


def _rank(beam: Sample) -> float:
  """Texts with a smaller one are better."""
  if beam.score == -np.inf:
    return np.inf
  return -beam.score / max(1, len(beam.tokens)) ** beam.sampling.length_penalty
