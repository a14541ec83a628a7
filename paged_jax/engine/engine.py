"""The engine: requests in, tokens out.

A round changes who runs if there is a reason to, dispatches the next call, reads the reports that are
due, and calls listeners. The device runs one call ahead: rows change hands behind the call that it
computes. Three things need all reports to be read first (`FullRead`).

    # handles   desk        requests and commands from any thread
    # rounds    scheduler   who runs          room        are there pages?
    #           calls       the device        delivery    texts, ends, listeners
    # threads   service
"""

import dataclasses
import functools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_jax import interrupts, meshes, sharding
from paged_jax.engine import audit, branches, service, warming
from paged_jax.engine import fingerprint as fingerprint_lib
from paged_jax.engine.audit import EngineAudit
from paged_jax.engine.calls import Calls, Piece
from paged_jax.engine.config import Counts, EngineConfig, FullRead
from paged_jax.engine.delivery import Delivery
from paged_jax.engine.desk import Desk
from paged_jax.engine.device import draws
from paged_jax.engine.device.records import most_prompts
from paged_jax.engine.handle import RequestHandle
from paged_jax.engine.queue import Queue
from paged_jax.engine.requests import Completion, OnToken
from paged_jax.engine.room import Room
from paged_jax.engine.sampling import Sampling
from paged_jax.engine.scheduler import Scheduler
from paged_jax.engine.service import Token
from paged_jax.engine.text import Tokenizer, Vocabulary
from paged_jax.host import FileStore, Manager, Persisted, Store

_log = logging.getLogger(__name__)


class Engine:
  """Continuous batching for one model on one cache.

  Safe to call from several threads: rounds take turns, those of its own thread (see `start`)
  included. A context manager that closes it.

  >>> import paged_jax
  >>> from paged_jax.engine import Engine, EngineConfig, Sampling
  >>> from paged_jax.testing.counting import Counting
  >>> cache = paged_jax.CacheConfig(
  ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
  ... )
  >>> with Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,))) as engine:
  ...   [[done]] = engine.generate([[1, 2, 3]], Sampling(max_new_tokens=4))
  >>> done.tokens, done.reason
  ([4, 5, 6, 7], 'length')

  Args:
    model: A pytree; `model(tokens i32[B], cache, plan) -> (hidden [B,...], cache)` writes keys and
      values and attends by `plan`, `model.logits(hidden) -> f32[B,V]`. Leaves that are no arrays are
      compiled in, and must be hashable.
    config: How to work.
    tokenizer: Needed for texts and stop strings: `decode(list of tokens) -> str`.
    mesh: Over its last axis KV heads are split, and all else is on every device. Weights stay where
      they are on the mesh (`models.load(path, mesh=mesh)`); those of one device are copied to all.

  Raises:
    NotImplementedError: The attention backend asked for cannot serve the cache.
    ValueError: The mesh has an axis that is not Auto.
  """

  def __init__(
    self, model: Any, config: EngineConfig, *, tokenizer: Tokenizer | None = None,
    mesh: Mesh | None = None,
  ):  # fmt: skip
    if mesh is not None:
      meshes.check_auto(mesh)
      config = dataclasses.replace(config, cache=sharding.split(config.cache, mesh))
      model = _on_mesh(model, mesh)
    self.config, self.tokenizer, self._model = config, tokenizer, model
    self.manager = Manager(config.cache, config.options)
    self.counts = Counts()
    self._queue = Queue(shares=config.options.prefix_cache)
    self._room = Room(self.manager, self._queue, config)
    self._calls = Calls(self.manager, model, self._queue, config, self.counts)
    self._scheduler = Scheduler(
      self.manager, self._queue, self._room, self._calls, config, self.counts
    )
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    self._desk = Desk(config, self._room, self.vocab_size, vocabulary)
    self._delivery = Delivery(self._desk, self._scheduler, config, self.counts)
    self._worker = service.Worker(self._desk.wake)
    self._turn = threading.RLock()  # one round at a time; taken before the desk's lock
    self._in_round = False

  def __enter__(self) -> "Engine":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  @property
  def failure(self) -> BaseException | None:
    """What a round has failed with: all requests have ended, and no other is taken."""
    return self._desk.failure

  @property
  def closed(self) -> bool:
    """Whether it has been closed."""
    return self._desk.closed

  @property
  def num_copies(self) -> int:
    """Pages copied on write, by reported calls and by the manager."""
    return self.manager.num_copies

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
    return len(self._queue.waiting) + len(self._desk.arrivals)

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

    >>> import paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> engine = Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,)))
    >>> handle = engine.submit([1, 2, 3], Sampling(max_new_tokens=4))
    >>> while engine.step():
    ...   pass
    >>> handle.tokens
    [[4, 5, 6, 7]]

    Args:
      prompt: Tokens.
      sampling: How to go on; greedy by default.
      priority: Higher ones go first, and may preempt lower ones.
      on_token: Called with (sample, new tokens, their logprobs, see `Completion`) after each round
        that read some, and when the sample has ended; of a beam search, only then.

    Raises:
      ValueError: The request could never run; the message says why.
      RuntimeError: The engine has failed, or is closed.
    """
    sampling = Sampling() if sampling is None else sampling
    return RequestHandle(self._desk, self._desk.submit(tuple(prompt), sampling, priority, on_token))

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
  ) -> list[list[Completion]]:
    """Runs prompts to their end; the samples of each. See the example of `Engine`.

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
      going = list(handles)
      while self.step():
        while going and going[-1].done:
          going.pop()
        if not going and self._desk.live:
          break  # others go on
    except (ValueError, KeyboardInterrupt):
      for handle in handles:
        handle.cancel()
      raise
    if not all(handle.done for handle in handles):
      raise self._scheduler.refusal or RuntimeError("requests wait, and no round can serve them")
    return [[done for done in handle.completions if done] for handle in handles]

  def stream(
    self, prompt: Sequence[int], sampling: Sampling | None = None, *, priority: int = 0
  ) -> AsyncIterator[Token]:
    """The tokens of a request as they come. A listener that leaves cancels it.

    The engine's own thread does the rounds; it starts with the first stream, see `close`.

    >>> import asyncio, paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> async def listen(engine):
    ...   return [x.token async for x in engine.stream([1, 2, 3], Sampling(max_new_tokens=4))]
    >>> with Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,))) as engine:
    ...   asyncio.run(listen(engine))
    [4, 5, 6, 7]

    Raises:
      RuntimeError: The request ended in an error.
    """

    def submit(on_token: OnToken) -> RequestHandle:
      handle = self.submit(prompt, sampling, priority=priority, on_token=on_token)
      self.start()
      return handle

    return service.stream(submit)

  # Its life

  def start(self) -> None:
    """Starts the engine's own thread, if it has none; it does the rounds until `close`."""
    with self._desk.lock:
      self._desk.check_open()
      self._worker.start(self._turned)

  def _turned(self) -> float | None:
    """One round in the own thread: most seconds until the next, None if there is to be none."""
    if self.closed or self.failure:
      return None
    try:
      going = self.step()
    except BaseException as error:
      _log.exception("a round failed; all requests end")
      if self.failure is None:
        self._fail(error)
      return None
    if going:
      return 0
    return 0.05 if self._queue.waiting.num_ready else 1  # others may give back what is missing

  def _fail(self, error: BaseException) -> None:
    """Every request ends, and no other is taken."""
    self._desk.failure = error
    self._end_all(repr(error))

  def _end_all(self, error: str) -> None:
    """Every request ends with an error."""
    with self._desk.lock:
      self._desk.arrivals.clear()
      self._desk.changed.clear()
      self._delivery.end_with(error, list(self._desk.live))
    self._delivery.tell_all()

  def close(self) -> None:
    """Stops the own thread, if there is one, after the round that is under way. What has not ended
    ends with an error, and no request is taken any more."""
    with self._desk.lock:
      self._desk.closed = True
      wait = self._worker.stop()
    with self._turn:
      if self._in_round:
        return  # by `on_token`: the round does the rest
      self._shut()
    wait()

  def _shut(self) -> None:
    """Ends what has not ended, and gives back what is held."""
    try:
      if self.failure is None:
        self._read_all()
    except Exception as error:  # the device is gone, maybe
      self._desk.failure = error
    self._end_all("the engine was closed")
    if self.failure is None:
      self._scheduler.tidy()
      self.manager.close()

  def audit(self) -> EngineAudit:
    """Reconciles requests, samples, rows and the manager. Reads the device, between rounds.

    >>> import paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,))).audit().clean
    True
    """
    with self._turn, self._desk.lock:
      coming = {sample for request in self._desk.arrivals for sample in request.samples}
      return audit.reconcile(self._scheduler, self._desk.live, coming | {*self._desk.changed})

  def warm_up(
    self,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    samplings: Iterable[Sampling] | None = None,
  ) -> None:
    """Compiles everything that requests will run, and measures what preemption costs.

    Before the first request. An attention kernel for GPU or TPU first proves itself on this device
    (`attention.verify`), once per device, versions and shape of pages: the proof is kept beside
    the compiled programs (`jax_compilation_cache_dir`), else for this process. A kernel that is
    wrong is not used if `EngineConfig.implementation` is None: a warning says which backend is,
    and has the table.

    Args:
      progress: Called with how many of how many programs are ready.
      samplings: What all requests will ask for, if that is known: programs that none of them needs
        are left out.

    Raises:
      NotImplementedError: The kernel that was asked for by name is wrong; the message has the table.
    """
    variants = (False, True) if samplings is None else {*map(draws.plain, samplings)}
    warming.warm_up(
      self.manager, self._calls, self._scheduler, self.config, sorted(variants), progress
    )

  # Prefixes that outlive the process

  @functools.cached_property
  def _fingerprint(self) -> str:
    return fingerprint_lib.fingerprint(self._model)

  def save_prefixes(
    self, store: str | os.PathLike[str] | Store, *, fingerprint: str | None = None
  ) -> Persisted:
    """Saves the prefix cache, so that an engine after this one starts with it; rounds go on.

    See docs/persistence.md.

    >>> import tempfile, paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> config, folder = EngineConfig(cache, prompt_sizes=(16,)), tempfile.mkdtemp()
    >>> with Engine(Counting(), config) as engine:
    ...   done = engine.generate([range(40)], Sampling(max_new_tokens=4))
    ...   saved = engine.save_prefixes(folder)
    >>> with Engine(Counting(), config) as engine:
    ...   loaded = engine.load_prefixes(folder)
    ...   handle = engine.submit(range(40), Sampling(max_new_tokens=4))
    ...   while engine.step():
    ...     pass
    >>> handle.num_cached, handle.tokens, engine.counts.prompt_tokens
    (40, [[40, 41, 42, 43]], 0)

    Args:
      store: A folder, or a store with a limit of its own: `host.FileStore(folder, max_bytes=...)`.
      fingerprint: Names the model; by default a digest of its arrays, which costs seconds for each
        gigabyte, once.

    Raises:
      OSError: The store takes no more; what was in it is as before.
    """
    return self.manager.save_prefixes(_opened(store), fingerprint or self._fingerprint)

  def load_prefixes(
    self, store: str | os.PathLike[str] | Store, *, fingerprint: str | None = None
  ) -> Persisted:
    """Loads what `save_prefixes` saved into free pages; see `Manager.load_prefixes`. Rounds wait.

    Raises:
      RuntimeError: It is called from within a round.
    """
    opened, named = _opened(store), fingerprint or self._fingerprint
    with self._turn:  # a round counts on its free pages
      if self._in_round:
        raise RuntimeError("load_prefixes must not be called from within a round, as on_token is")
      return self.manager.load_prefixes(opened, named)

  # One round

  def step(self) -> bool:
    """One round: takes in, admits, dispatches, hands out. False if there was nothing to do.

    See the example of `submit`.

    Raises:
      RuntimeError: The engine has failed, or `step` is called from within a round.
    """
    with self._turn:
      if self.closed:
        return False
      self._desk.check_open()
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
      if self.closed:
        self._shut()

  def _round(self) -> bool:
    scheduler, flying = self._scheduler, len(self._calls)
    commands, over = self._take_in(), scheduler.only_ended
    if commands:
      self._read_all(FullRead.COMMANDS)
      self._delivery.tell_all()  # what was drawn before the commands
      self._carry_out()
    elif over:
      self._read_all(FullRead.ENDED)
    if commands or over or scheduler.may_admit():
      self._admit()
    pieces = self._secured()
    dispatched = bool(pieces) or any(sample.draws for sample in self._queue.running.values())
    if dispatched:
      self._dispatch(pieces)
    behind = len(self._calls) - dispatched  # one call stays in flight
    for _ in range(behind):
      self._read()
    self._delivery.tell_all()  # the next call computes meanwhile
    return dispatched or flying > 0 or bool(scheduler.ended) or commands

  def _take_in(self) -> bool:
    """Puts what has arrived into the queue; whether there are changes to carry out."""
    desk = self._desk
    with desk.lock:
      for request in desk.arrivals:
        for sample in request.samples:
          if sample is sample.beams[0]:
            self._queue.waiting.add(sample)
      desk.arrivals.clear()
      return bool(desk.changed)

  def _carry_out(self) -> None:
    """Makes of all changed samples what commands said; all reports have been read."""
    desk = self._desk
    with desk.lock:
      self._take_in()  # the changed ones among the arrivals must be in the queue
      changed = [(sample, now) for sample in desk.changed if (now := sample.become())]
      desk.changed.clear()
      for sample, _ in changed:
        desk.live[sample] = None
        self._delivery.tell_later(sample)
    branches.apply(self._scheduler, changed)
    with desk.lock:
      for sample, now in changed:
        if now.reason is not None:
          self._delivery.end(sample, now.reason)

  def _admit(self) -> None:
    """Rows to those first in line."""
    self._scheduler.tidy()
    if not self._scheduler.admit():
      self._read_all(FullRead.MOVES)
      self._scheduler.tidy()
      self._scheduler.admit()

  def _secured(self) -> list[Piece]:
    """The pieces of prompts of the next call; the pages that it needs are free."""
    pieces = self._scheduler.pieces()
    if self._room.fits(1 if pieces else self.config.num_steps):
      return pieces
    self._read_all(FullRead.MOVES)
    self._scheduler.tidy()
    if stuck := self._scheduler.make_room(self.config.num_steps):
      self._delivery.end_with(str(stuck[1]), stuck[0].beams)
    return self._scheduler.pieces()

  def _dispatch(self, pieces: list[Piece]) -> None:
    total = sum(piece.num_tokens for piece in pieces)
    prompts = sum(piece.num_tokens > 0 for piece in pieces)
    fits = (x for x in self.config.prompt_sizes if x >= total and most_prompts(x) >= prompts)
    size = (next(fits) if total else 0) if pieces else None
    self._scheduler.prepare(pieces)
    self._calls.dispatch(pieces, size, 1 if pieces else self.config.num_steps)
    self._scheduler.started(pieces)
    self.counts.calls += 1
    self.counts.prompt_tokens += total

  def _read_all(self, reason: FullRead | None = None) -> None:
    """Reads all reports, and counts why."""
    if reason and len(self._calls):
      self.counts.full_reads[reason] += 1
    while len(self._calls):
      self._read()

  def _read(self) -> None:
    """Reads the oldest report."""
    self._calls.await_report()
    self._delivery.take(self._calls.collect())


def _on_mesh(model: Any, mesh: Mesh) -> Any:
  """The model with every array on the mesh, those that are not yet on all of its devices."""
  devices, everywhere = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())

  def put(leaf):
    there = not isinstance(leaf, jax.Array) or leaf.sharding.device_set == devices
    return leaf if there else jax.device_put(leaf, everywhere)

  return jax.tree.map(put, model)


def _opened(store: str | os.PathLike[str] | Store) -> Store:
  """A store, or that in a folder."""
  return FileStore(store) if isinstance(store, str | os.PathLike) else store
