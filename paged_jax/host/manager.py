"""The manager: requests, handles, prefix cache, swap and pressure, on top of the verbs.

It speaks to the cache in verbs only, decides everything on the ledger's twin, and so never waits
for the device. One lock covers each transition; callbacks run after it. Axis letters as in
types.py.

    # request  ──▶ Sequence ──▶ a row of the cache                  running
    #                       └─▶ pages that the host keeps (Held)    swapped out
    # tokens   ──▶ PrefixIndex ──▶ Held
"""

import contextlib
import dataclasses
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import jitted
from paged_jax.config import CacheConfig
from paged_jax.host import canary, errors, events, pressure
from paged_jax.host.config import ManagerConfig, Request, whole
from paged_jax.host.handle import Handle
from paged_jax.host.holds import Held, pages_of
from paged_jax.host.kept import Residency
from paged_jax.host.prefix import TOKEN_BYTES, Match, PrefixIndex, encoded
from paged_jax.host.state import ID_SIZES, State, Ticket, bucket, row_sizes
from paged_jax.host.stats import AuditReport, Collected, PrefixStats, SequenceStats, Stats
from paged_jax.ledger import on_host as twin
from paged_jax.types import Audit, Cache


@dataclasses.dataclass(eq=False, slots=True)
class _Sequence:
  """A live sequence."""

  handle: Handle
  row: int | None
  max_length: int
  namespace: Hashable
  last_access: float
  tokens: Sequence[int] | np.ndarray = ()  # while swapped out: those recorded
  writers: list = dataclasses.field(default_factory=list)  # canary marks
  start: int = 0  # these three while swapped out
  length: int = 0
  held: list[Held] = dataclasses.field(default_factory=list)

  @property
  def request_id(self) -> Hashable:
    """Its request."""
    return self.handle.request_id

  @property
  def cache_id(self) -> int:
    """Unique to this sequence."""
    return self.handle.cache_id


class Prefix(NamedTuple):
  """What `store_prefixes` keeps of a sequence; see `store_prefix`."""

  handle: Handle
  tokens: Sequence[int] | np.ndarray | None = None
  last_logits: Any = None
  ttl: float | None = None
  pinned: bool = False


class Manager:
  """Paged KV cache manager. Safe to call from several threads.

  A method that changes something may raise any of `paged_jax.host.errors` and then has changed no
  sequence. While a program is unreported (see `run`), the next method waits for its report, unless it
  is told not to.

  Args:
    config: The cache.
    options: What the manager does beyond it.
    clock: Seconds, for lifetimes and access times.
    shardings: Where the cache lives, as `paged_jax.sharding.shardings` says; one device by default.
    verbs: Compiled verbs to use, `paged_jax.jitted` by default.
  """

  def __init__(
    self,
    config: CacheConfig,
    options: ManagerConfig | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    shardings: Cache | None = None,
    verbs=jitted,
  ):
    self.config = config
    self.options = ManagerConfig() if options is None else options
    self._clock = clock
    self._lock = threading.Lock()
    self._sequences: dict[Hashable, _Sequence] = {}
    self._rows = list(range(config.num_rows))  # a heap of the free ones
    self._cache_ids = itertools.count(1)
    width = config.pages_per_row * config.page_size + 1  # the last column is for what is too much
    self._tokens = np.zeros((config.num_rows, width), np.int32)
    self._known = np.zeros(config.num_rows, np.int32)  # recorded tokens of each row
    prefixes = PrefixIndex(
      config.page_size,
      max_entries=self.options.max_prefixes if self.options.prefix_cache else 0,
      min_length=self.options.min_prefix_length,
      policy=self.options.eviction,
      clock=clock,
    )
    layers = config.num_layers + self.options.canary
    self._state = State(dataclasses.replace(config, num_layers=layers), verbs, shardings)
    self._kept = Residency(self._state, self.options, prefixes, self._left)
    self._notifier = pressure.Notifier(self._level())
    self._events = events.Stream(self.options.event_buffer, self._snapshot)
    self._count = dict.fromkeys(("allocations", "deallocations", "refusals", "copies"), 0)
    self._forgotten = 0  # evictions before the prefix counters were reset
    self._lookups = dict.fromkeys(("queries", "hits", "misses", "tokens_queried", "tokens_hit"), 0)

  # One transition

  @contextlib.contextmanager
  def _transition(self, *, wait: bool = True, last: Ticket | None = None) -> Iterator[None]:
    """Runs one change under the lock. First, if it is to `wait`, takes over the reports of programs up
    to `last`, by default of all. Afterwards updates the counts and, outside the lock, calls the
    pressure callbacks."""
    try:
      with self._lock:
        if wait and self._state.settle(last):
          self._kept.count_pages()
          if self.options.canary:  # programs leave no marks
            for sequence in self._sequences.values():
              sequence.writers.clear()
        try:
          yield
        except (errors.OutOfPages, errors.OutOfHostPages, errors.OutOfRows):
          self._count["refusals"] += 1
          raise
        finally:
          self._notifier.observe(self._level(), self._state.num_free)
    finally:
      self._notifier.deliver()

  def _level(self) -> pressure.Level:
    low, high = self.options.low_watermark, self.options.high_watermark
    return pressure.level(self._state.num_free, self.config.num_pages, low, high)

  # Sequences

  def allocate(self, request: Request) -> Handle:
    """A new sequence. See `allocate_many`."""
    return self.allocate_many([request])[0]

  def allocate_many(
    self, requests: Sequence[Request], *, reserve: int = 0, spare: int = 0, wait: bool = True
  ) -> list[Handle]:
    """New sequences, all or none: one call of each verb for all of them.

    Cached prefixes are kept before any page is taken, unless there is only room without. On a full
    hit with stored logits nothing is left to compute, and `handle.last_logits` has them; otherwise
    at least the last token is.

    Args:
      requests: What each asks for.
      reserve: Pages that must be free afterwards.
      spare: If prefixes must be evicted, those on so many more pages go at once.
      wait: Whether to wait for the reports of programs. If not, what these may still take must be
        in the reserve, and which pages the new sequences have is known after the reports.

    Raises:
      DuplicateRequest: An id is live already, or given twice.
      ShapeMismatch: A request has other layers, heads, head dim or dtype than the pool.
      TooLong: More initial tokens than may be held.
      OutOfRows, OutOfPages: There is no room; what is needed includes the reserve.
    """
    reserve, spare = whole("reserve", reserve, 0), whole("spare", spare, 0)
    with self._transition(wait=wait):
      self._check_requests(requests)
      prompts = [encoded(() if x.tokens is None else x.tokens) for x in requests]
      if len(requests) > len(self._rows):
        raise errors.OutOfRows(needed=len(requests), free=len(self._rows))
      self._kept.expire()
      found = [self._match(*each, touch=True) for each in zip(requests, prompts)]
      guard = {each for match in found for each in match.held}
      if self._level() == pressure.Level.CRITICAL:
        self._kept.collect(int(self.options.high_watermark * self.config.num_pages), guard)
      stay = not guard or self._fits(requests, found, reserve)
      matches = found if stay else [_NOTHING] * len(requests)
      guard = {each for match in matches for each in match.held}
      self._kept.make_room(self._needed(requests, matches) + reserve, guard, spare)
      self._kept.to_device([each for each in dict.fromkeys(guard) if each.page is None])
      handles = [self._begin(request, match) for request, match in zip(requests, matches)]
      rows = [self._running(handle)[1] for handle in handles]
      self._adopt([(row, match.held, 0, match.length) for row, match in zip(rows, matches)])
      growth = [request.num_tokens - match.length for request, match in zip(requests, matches)]
      self._extend({row: count for row, count in zip(rows, growth) if count})
      self._count["allocations"] += len(handles)
      for prompt, match in zip(prompts, matches):
        if prompt and self.options.prefix_cache:
          self._count_lookup(prompt, match)
      return handles

  def _fits(self, requests: Sequence[Request], matches: Sequence[Match], reserve: int = 0) -> bool:
    """Whether there is room for these requests, and a reserve, while their matches stay."""
    short = self._needed(requests, matches) + reserve - self._state.num_free
    guard = {each for match in matches for each in match.held}
    return short <= 0 or short <= self._kept.reclaimable(guard)  # which may visit the whole index

  def _check_requests(self, requests: Sequence[Request]) -> None:
    config = self.config
    seen: set[Hashable] = set()
    for request in requests:
      if request.request_id in self._sequences or request.request_id in seen:
        raise errors.DuplicateRequest(request.request_id)
      seen.add(request.request_id)
      for name in ("num_layers", "num_kv_heads", "head_dim"):
        wanted, got = getattr(config, name), getattr(request, name)
        if got is not None and got != wanted:
          raise errors.ShapeMismatch(name, wanted, got)
      if request.dtype is not None and np.dtype(request.dtype) != config.dtype:
        raise errors.ShapeMismatch("dtype", config.dtype, np.dtype(request.dtype))
      capacity = config.pages_per_row * config.page_size
      limit = capacity if request.max_length is None else request.max_length
      if limit > capacity:
        raise errors.TooLong(request.request_id, limit, capacity)
      known = 0 if request.tokens is None else len(request.tokens)
      if max(request.num_tokens, known) > limit:
        raise errors.TooLong(request.request_id, max(request.num_tokens, known), limit)

  def _needed(self, requests: Sequence[Request], matches: Sequence[Match]) -> int:
    """Pages that these requests take: restored, copied and new ones."""
    size, needed = self.config.page_size, 0
    restored = {each for match in matches for each in match.held if each.page is None}
    for request, match in zip(requests, matches):
      initial, length = request.num_tokens, match.length
      needed += -(-initial // size) - -(-length // size)
      needed += bool(length % size and initial > length)
    return needed + len(restored)

  def _match(self, request: Request, prompt: bytes, *, touch: bool) -> Match:
    """The cached beginning of a request, cut to what it can use."""
    if not (prompt and self.options.prefix_cache):
      return _NOTHING
    look_up = self._kept.prefixes.find if touch else self._kept.prefixes.peek
    match, size = look_up(request.namespace, prompt), len(prompt) // TOKEN_BYTES
    length = min(match.length, request.num_tokens)
    if match.last_logits is None:
      length = min(length, size - 1)
    if not self.config.copy_on_write:
      length -= length % self.config.page_size
    held = match.held[: -(-length // self.config.page_size)]
    return Match(length, match.last_logits if length == size else None, held)

  def _begin(self, request: Request, match: Match) -> Handle:
    capacity = self.config.pages_per_row * self.config.page_size
    row = heapq.heappop(self._rows)
    handle = Handle(self, request.request_id, next(self._cache_ids))
    handle.num_cached, handle.last_logits = match.length, match.last_logits
    self._sequences[request.request_id] = _Sequence(
      handle=handle,
      row=row,
      max_length=capacity if request.max_length is None else request.max_length,
      namespace=request.namespace,
      last_access=self._clock(),
      writers=[None] * match.length if self.options.canary else [],
    )
    self._know(row, () if request.tokens is None else request.tokens)
    return handle

  def _know(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
    """The recorded tokens of a sequence that just got its row."""
    self._known[row] = len(tokens)
    self._tokens[row, : len(tokens)] = tokens

  def _recorded(self, row: int, num_tokens: int | None = None) -> np.ndarray:
    known = int(self._known[row])
    return self._tokens[row, : known if num_tokens is None else min(known, num_tokens)]

  def _adopt(self, starts: Sequence[tuple[int, list[Held], int, int]]) -> None:
    """Empty rows begin on kept pages: (row, pages, start, length) each."""
    config = self.config
    starts = [each for each in starts if each[3]]
    if not starts:
      return
    b = bucket(len(starts), row_sizes(config.num_rows))
    for i in range(0, len(starts), b):
      rows = np.full(b, config.num_rows, np.int32)
      pages = np.full((b, config.pages_per_row), config.num_pages, np.int32)
      begins, lengths = np.zeros((2, b), np.int32)
      for n, (row, held, begin, length) in enumerate(starts[i : i + b]):
        rows[n], begins[n], lengths[n] = row, begin, length
        pages[n, : len(held)] = pages_of(held)
      whole = (
        lengths if config.copy_on_write else -(-lengths // config.page_size) * config.page_size
      )
      self._kept.apply("adopt", rows, pages, whole, begins)

  def _extend(self, growth: Mapping[int, int]) -> None:
    """Room in rows, which must be there."""
    if not growth:
      return
    num_tokens = np.zeros(self.config.num_rows, np.int32)
    num_tokens[list(growth)] = list(growth.values())
    self._count["copies"] += int(twin.copied(self._state.ledger, num_tokens > 0).sum())
    self._kept.apply("extend", num_tokens)

  def extend(self, handle: Handle, num_tokens: int) -> None:
    """Room for `num_tokens` more tokens; a shared, partly filled tail page is copied first.

    Raises:
      StaleHandle, SwappedOut, TooLong: Whom or how much.
      OutOfPages: All pages are in use.
      Disabled: It would need a copy, and copy-on-write is off.
    """
    self.extend_many({handle: num_tokens})

  def extend_many(self, num_tokens: Mapping[Handle, int]) -> None:
    """Room in many sequences at once, all or none: one call for all of them."""
    with self._transition():
      growth: dict[int, int] = {}
      for handle, count in num_tokens.items():
        sequence, row = self._running(handle)
        count = whole("num_tokens", count, 0)
        wanted = int(self._state.lengths[row]) + count
        if wanted > sequence.max_length:
          raise errors.TooLong(sequence.request_id, wanted, sequence.max_length)
        growth[row] = count
      counts = np.zeros(self.config.num_rows, np.int32)
      counts[list(growth)] = list(growth.values())
      size, lengths = self.config.page_size, self._state.lengths
      copied = twin.copied(self._state.ledger, counts > 0)
      if copied.any() and not self.config.copy_on_write:
        raise errors.Disabled("copy-on-write")
      new = -(-(lengths + counts) // size) - -(-lengths // size)
      self._kept.make_room(int(new.sum() + copied.sum()), set())
      self._extend(growth)

  def trim(self, handle: Handle, num_tokens: int) -> None:
    """A sequence keeps its first `num_tokens` tokens, and releases whole pages behind them.

    Raises:
      UnmappedToken: It does not hold that many, or has slid past them.
    """
    with self._transition():
      self._cut("trim", handle, num_tokens)

  def slide(self, handle: Handle, start: int) -> None:
    """A sequence forgets its tokens before `start`, and releases whole pages before them.

    Raises:
      UnmappedToken: It does not reach that far.
    """
    with self._transition():
      self._cut("slide", handle, start)

  def _cut(self, verb: str, handle: Handle, at: int) -> None:
    at = whole("num_tokens" if verb == "trim" else "start", at)
    sequence, row = self._running(handle)
    state = self._state
    begin, end = int(state.starts[row]), int(state.lengths[row])
    if not (begin if verb == "trim" and at else 0) <= at <= end:
      raise errors.UnmappedToken(sequence.request_id, at // self.config.page_size, at)
    values = (state.lengths if verb == "trim" else state.starts).copy()
    values[row] = at
    before = self._mapped(row)
    self._kept.apply(verb, values)
    if verb == "trim":
      self._known[row] = min(self._known[row], at)
      del sequence.writers[at:]
    self._kept.scrub(sorted(set(before) - set(self._mapped(row))))

  def deallocate(self, request_id: Hashable) -> None:
    """Ends a sequence: its own holds on pages, on the device or in host memory, are released.

    Raises:
      UnknownRequest: No live sequence has this id.
    """
    self.deallocate_many([request_id])

  def deallocate_many(self, request_ids: Sequence[Hashable], *, wait: bool = True) -> None:
    """Ends many sequences, all or none, in one call.

    Args:
      request_ids: Which.
      wait: Whether to wait for the reports of programs, which scrub mode always does. If not, no
        program dispatched later may use these sequences' rows.
    """
    with self._transition(wait=wait or self.options.scrub):
      for request_id in request_ids:
        if request_id not in self._sequences:
          raise errors.UnknownRequest(request_id)
      if len(set(request_ids)) != len(request_ids):
        raise ValueError(f"request_ids must be distinct, got {list(request_ids)}")
      ended = [self._sequences.pop(request_id) for request_id in request_ids]
      self._free([each.row for each in ended if each.row is not None])
      for sequence in ended:
        if sequence.row is not None:
          heapq.heappush(self._rows, sequence.row)
        for each in sequence.held:
          each.swapped -= 1
        self._kept.drop(sequence.held)
        self._event("removed", sequence.request_id, len(sequence.held), sequence.length)
      self._count["deallocations"] += len(ended)

  def _free(self, rows: list[int]) -> None:
    """Rows, those of them that hold something, become empty."""
    marked = np.zeros(self.config.num_rows, bool)
    marked[rows] = True
    marked &= self._state.lengths > 0
    if marked.any():
      pages = self._state.block_tables[marked]
      self._kept.apply("free", marked)
      self._kept.scrub(pages[pages < self.config.num_pages].tolist())

  def can_allocate(self, request: Request) -> bool:
    """Whether `allocate` would succeed now. Pages of prefixes that nobody uses count as free."""
    with self._transition():
      try:
        self._check_requests([request])
      except errors.CacheError:
        return False
      prompt = encoded(() if request.tokens is None else request.tokens)
      self._kept.expire()
      match = self._match(request, prompt, touch=False)
      fits = self._fits([request], [match]) or self._fits([request], [_NOTHING])
      return bool(self._rows) and fits

  # Sharing

  def share_prefix(self, source: Handle, target: Handle, num_tokens: int) -> None:
    """The empty `target` gets the first tokens of `source`, on the same pages.

    Raises:
      NotEmpty: The target holds tokens.
      UnmappedToken: The source does not hold that many.
      Disabled: Part of a page would be shared, and copy-on-write is off.
    """
    with self._transition():
      self._share(source, target, num_tokens)

  def _share(self, source: Handle, target: Handle, num_tokens: int) -> None:
    state, size, num_tokens = self._state, self.config.page_size, whole("num_tokens", num_tokens)
    (giver, src), (taker, dst) = self._running(source), self._running(target)
    if num_tokens > taker.max_length:
      raise errors.TooLong(taker.request_id, num_tokens, taker.max_length)
    if state.lengths[dst]:
      raise errors.NotEmpty(taker.request_id, int(state.lengths[dst]))
    held, begin = int(state.lengths[src]), int(state.starts[src])
    if not (begin <= num_tokens <= held or num_tokens == 0):
      raise errors.UnmappedToken(giver.request_id, num_tokens // size, num_tokens)
    if num_tokens % size and not self.config.copy_on_write:
      raise errors.Disabled("copy-on-write")
    self._kept.apply("fork", *(np.array([x, y], np.int32) for x, y in (
      (src, self.config.num_rows), (dst, self.config.num_rows), (num_tokens, 0))))  # fmt: skip
    self._know(dst, self._recorded(src, num_tokens))
    taker.writers = giver.writers[:num_tokens]
    self._event("forked", taker.request_id, -(-num_tokens // size), num_tokens)

  def clone(self, handle: Handle, request_id: Hashable, *, num_tokens: int | None = None) -> Handle:
    """A new sequence that shares the pages of `handle`'s first `num_tokens`, by default of all."""
    with self._transition():
      sequence, row = self._running(handle)
      request = Request(request_id, 0, namespace=sequence.namespace)
      self._check_requests([request])
      if not self._rows:
        raise errors.OutOfRows(needed=1, free=0)
      held, begin = int(self._state.lengths[row]), int(self._state.starts[row])
      length = held if num_tokens is None else whole("num_tokens", num_tokens)
      if not (begin <= length <= held or length == 0):
        raise errors.UnmappedToken(handle.request_id, length // self.config.page_size, length)
      if length % self.config.page_size and not self.config.copy_on_write:
        raise errors.Disabled("copy-on-write")
      copy = self._begin(dataclasses.replace(request, max_length=sequence.max_length), _NOTHING)
      self._share(handle, copy, length)
      self._count["allocations"] += 1
      return copy

  def cow_copy(self, handle: Handle, first_page: int = 0) -> list[int]:
    """Makes the logical pages from `first_page` on the sequence's own; returns its pages.

    Shared ones are copied, remapped and released, so that tokens on them may be rewritten.

    Raises:
      Disabled: Copy-on-write is off.
      OutOfPages: There is no room for the copies.
    """
    with self._transition():
      _, row = self._running(handle)
      if not self.config.copy_on_write:
        raise errors.Disabled("copy-on-write")
      self._own(handle, row, whole("first_page", first_page, 0) * self.config.page_size)
      return self._mapped(row)

  def _own(self, handle: Handle, row: int, start: int) -> None:
    """The pages of `start` and after get no other holder."""
    state, size = self._state, self.config.page_size
    length = int(state.lengths[row])
    if not 0 <= start < max(length, 1):
      raise errors.UnmappedToken(handle.request_id, start // size, start)
    first = max(start, int(state.starts[row])) // size
    pages = state.block_tables[row, first : -(-length // size)]
    shared = int((state.refcount[pages] > 1).sum())
    if shared:
      if not self.config.copy_on_write:
        raise errors.Disabled("copy-on-write")
      self._kept.make_room(shared, set())
      starts = state.lengths.copy()
      starts[row] = start
      self._count["copies"] += shared
      self._kept.apply("unshare", starts)

  def warm_up(self) -> None:
    """Compiles what sequences come, go, share and move with; nothing changes."""
    with self._transition():
      options = self.options
      swapping = options.swapping and options.num_host_pages > 0
      holding = options.swapping or options.prefix_cache
      self._state.warm_up(holding=holding, swapping=swapping, scrubbing=options.scrub)

  # What a program may take. These do not wait: they know what the last report taken over said, and
  # what came after it but for programs.

  @property
  def num_free(self) -> int:
    """Free pages."""
    return self._state.num_free

  @property
  def num_free_rows(self) -> int:
    """Rows without a sequence."""
    return len(self._rows)

  @property
  def num_copies(self) -> int:
    """Pages copied on write by the manager's own verbs; programs count theirs."""
    return self._count["copies"]

  @property
  def num_mapped(self) -> int:
    """Pages that rows map, a shared one once for each: what they would take, were none shared."""
    return int(np.count_nonzero(self._state.block_tables < self.config.num_pages))

  @property
  def num_idle(self) -> int:
    """Pages that only the host holds; at most so many could be had by eviction."""
    state = self._state
    return int(np.count_nonzero((state.holds == 1) & (state.refcount == 1)))

  @property
  def num_reclaimable(self) -> int:
    """Pages that could be had by eviction."""
    with self._lock:
      return self._kept.reclaimable(set())

  def pages_to_begin(self, tokens: Sequence[int] | np.ndarray) -> int:
    """Pages that `allocate` would take for these tokens, besides those in the prefix cache."""
    with self._lock:
      request = Request(None, tokens=tokens)
      return self._needed([request], [self._match(request, encoded(tokens), touch=False)])

  def pages_to_reach(self, lengths: np.ndarray) -> int:
    """Pages that rows take, copies included, when they grow to `lengths` i32[S] tokens, if they have
    fewer."""
    with self._lock:
      now, size = self._state.lengths, self.config.page_size
      then = np.maximum(lengths, now)
      new = -(-then // size) - -(-now // size)
      return int(new.sum() + twin.copied(self._state.ledger, then > now).sum())

  def pages_to_search(self, handles: Sequence[Handle], length: int, shared: int) -> int:
    """Most pages that sequences take when they grow to `length` tokens each and `reorder` among
    themselves, but keep sharing their first `shared` tokens."""
    with self._lock:
      state, size = self._state, self.config.page_size
      rows = [self._row(handle) for handle in handles]
      pages = state.block_tables[rows, shared // size :]
      own, entries = np.unique(pages[pages < self.config.num_pages], return_counts=True)
      alone = int((state.refcount[own] == entries).sum())
      return max(0, len(rows) * (-(-length // size) - shared // size) - alone)

  # Bytes

  def write_kv(self, handle: Handle, layer: int, position: int, k, v) -> None:
    """Writes keys and values [B,H,D] (or [H,D] for one token) of tokens from `position` on.

    A page that others hold, and those behind it, are copied first, so that only this sequence sees
    the write.

    Raises:
      UnmappedToken: The sequence does not hold all of these tokens.
      ShapeMismatch: Keys or values have another shape.
    """
    config = self.config
    shape = (config.num_kv_heads, config.head_dim)
    k, v = (jnp.asarray(x)[None] if jnp.ndim(x) == 2 else jnp.asarray(x) for x in (k, v))
    for name, x in (("k", k), ("v", v)):
      if x.ndim != 3 or x.shape[1:] != shape or x.shape[0] != k.shape[0] or not x.shape[0]:
        raise errors.ShapeMismatch(name, ("B", *shape), x.shape)
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise errors.ShapeMismatch(name, "floating-point", x.dtype)
    layer, position = self._layer(layer), whole("position", position)
    count = k.shape[0]
    with self._transition():
      sequence, row = self._running(handle)
      self._check_range(sequence, row, position, count)
      self._own(handle, row, position)
      size = bucket(count, ID_SIZES)
      if size < count:
        size = -(-count // size) * size
      rows, positions = np.full(size, config.num_rows, np.int32), np.zeros(size, np.int32)
      rows[:count], positions[:count] = row, position + np.arange(count)
      pad = ((0, size - count), (0, 0), (0, 0))
      state = self._state
      plan = state.verbs.plan(state.cache, rows, positions)
      k, v = (jnp.pad(x.astype(config.dtype), pad) for x in (k, v))
      state.cache = state.verbs.write(state.cache, jnp.int32(layer), k, v, plan)
      if self.options.canary:
        marks = canary.marks(sequence.cache_id, positions, shape, np.dtype(config.dtype))
        state.cache = state.verbs.write(state.cache, jnp.int32(config.num_layers), *marks, plan)
        sequence.writers += [None] * (position + count - len(sequence.writers))
        sequence.writers[position : position + count] = [sequence.cache_id] * count

  def read_kv(
    self, handle: Handle, layer: int, start: int, num_tokens: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [num_tokens,H,D] in token order, on the host; waits for the device.

    Raises:
      UnmappedToken: The sequence does not hold all of these tokens.
      CanaryMismatch: In canary mode, a slot is not what this sequence wrote.
    """
    config = self.config
    layer, start = self._layer(layer), whole("start", start)
    num_tokens = whole("num_tokens", num_tokens)
    with self._transition():
      sequence, row = self._running(handle)
      self._check_range(sequence, row, start, num_tokens)
      state, rows = self._state, np.array([row], np.int32)
      k, v = state.verbs.gather(state.cache, jnp.int32(layer), rows)
      marks, writers = None, sequence.writers[start : start + num_tokens]
      if self.options.canary:
        marks = state.verbs.gather(state.cache, jnp.int32(config.num_layers), rows)
      pages = state.block_tables[row]
    part = slice(start, start + num_tokens)
    if marks is not None:
      wrong = canary.mismatch(writers, start, *(np.asarray(x[0, part]) for x in marks))
      if wrong is not None:
        raise errors.CanaryMismatch(
          sequence.request_id, wrong, int(pages[wrong // config.page_size])
        )
    return np.asarray(k[0, part]), np.asarray(v[0, part])

  def _layer(self, layer: int) -> int:
    if not 0 <= whole("layer", layer) < self.config.num_layers:
      raise ValueError(f"layer must be in [0, {self.config.num_layers}), got {layer}")
    return int(layer)

  def _check_range(self, sequence: _Sequence, row: int, start: int, count: int) -> None:
    begin, end = int(self._state.starts[row]), int(self._state.lengths[row])
    for token in (start, start + count - 1):
      if not begin <= token < end or count < 1:
        raise errors.UnmappedToken(sequence.request_id, token // self.config.page_size, token)

  # Programs of the user's own

  def run(self, program: Callable, *args, **kwargs) -> Ticket:
    """Runs `program(cache, *args, **kwargs)`, which returns (cache, log, result).

    The cache is donated if the program says so. `log` is a `paged_jax.Log` of every ledger verb
    that it ran. Nothing waits: the log is read by the next method, or by `settle`. Room for what
    the program may extend is for the caller to see to (`available_pages`).

    Returns:
      A ticket: `ticket.result` is the third thing that the program returned, `settle(ticket)` takes
      over its report.
    """
    with self._lock:
      return self._state.run(program, *args, **kwargs)

  def settle(
    self,
    ticket: Ticket | None = None,
    *,
    tokens: np.ndarray | None = None,
    num_tokens: np.ndarray | None = None,
  ) -> int:
    """Waits for the report of a program and those before it, by default for all, and takes them over.

    Tokens that came with them are recorded; see `record`.

    Args:
      ticket: What `run` returned.
      tokens: Given with `num_tokens`, or not at all.
      num_tokens: See `record`.

    Returns:
      Free pages, as of the last report taken.
    """
    if (tokens is None) != (num_tokens is None):
      raise ValueError("tokens and num_tokens must be given together")
    if tokens is not None and num_tokens is not None:
      self.record(tokens, num_tokens)
    with self._transition(last=ticket):
      return self._state.num_free

  def record(self, tokens: np.ndarray, num_tokens: np.ndarray) -> None:
    """Notes what sequences came to hold, so that `store_prefix` knows it.

    Args:
      tokens: i32[K,S] new tokens of each row, one step a line.
      num_tokens: i32[S] how many of them, from the first line on, are a row's.
    """
    with self._lock:
      known, capacity = self._known, self._tokens.shape[1] - 1
      num_tokens = np.minimum(num_tokens, capacity - known).astype(np.int32)
      rows = np.flatnonzero(num_tokens)
      columns = np.minimum(known[rows, None] + np.arange(len(tokens)), capacity)
      self._tokens[rows[:, None], columns] = tokens[:, rows].T  # what is too much is not known
      self._known = known + num_tokens

  # Prefixes

  def find_prefix(self, tokens: Sequence[int] | np.ndarray, namespace: Hashable = None) -> Match:
    """The longest stored prefix of `tokens`; counts as a use. `allocate` looks for itself."""
    with self._lock:
      key = encoded(tokens)
      match = self._kept.prefixes.find(namespace, key)
      self._count_lookup(key, match)
      return match

  def _count_lookup(self, prompt: bytes, match: Match) -> None:
    count = self._lookups
    count["queries"] += 1
    count["hits" if match.length else "misses"] += 1
    count["tokens_queried"] += len(prompt) // TOKEN_BYTES
    count["tokens_hit"] += match.length

  def store_prefix(
    self,
    handle: Handle,
    tokens: Sequence[int] | np.ndarray | None = None,
    *,
    last_logits: Any = None,
    ttl: float | None = None,
    pinned: bool = False,
  ) -> bool:
    """Keeps the pages of a sequence's first tokens for others to start on.

    Args:
      handle: The sequence; it may go on, and end, as it likes.
      tokens: What it holds from position 0 on; by default all that is known of it.
      last_logits: Returned when somebody asks for exactly these tokens; None keeps those that are
        stored.
      ttl: Seconds until they are gone; None = never.
      pinned: Whether they stay until `pin` says otherwise.

    Returns:
      Whether they were stored: not if too short, or if every entry is pinned or in use.

    Raises:
      UnmappedToken: The sequence does not hold that many tokens, or has slid.
    """
    return self.store_prefixes([Prefix(handle, tokens, last_logits, ttl, pinned)])[0]

  def store_prefixes(self, prefixes: Sequence[Prefix], *, wait: bool = True) -> list[bool]:
    """Keeps the pages of several prefixes, in order; one call of each verb for all of them.

    Args:
      prefixes: What to keep.
      wait: Whether to wait for the reports of programs. If not, these must not take a page of the
        prefixes from their sequences, as a copy on write or a trim would.

    Returns:
      Which were stored; see `store_prefix`.

    Raises:
      UnmappedToken: A sequence does not hold that many tokens, or has slid; nothing is stored.
    """
    with self._transition(wait=wait):
      keys = [self._key(prefix) for prefix in prefixes]
      held: list[int] = []
      dropped: list[int] = []
      stored = [self._store(*each, held, dropped) for each in zip(prefixes, keys)]
      self._state.apply_ids("hold", held)
      self._kept.let_go(dropped)
      return stored

  def _key(self, prefix: Prefix) -> bytes:
    """The encoded tokens of a prefix that its sequence holds."""
    sequence, row = self._running(prefix.handle)
    length, ttl = int(self._state.lengths[row]), prefix.ttl
    tokens = self._recorded(row, length) if prefix.tokens is None else prefix.tokens
    if len(tokens) > length or self._state.starts[row]:
      page = len(tokens) // self.config.page_size
      raise errors.UnmappedToken(sequence.request_id, page, len(tokens))
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or ttl < 0):
      raise ValueError(f"ttl must be None or a number of seconds, got {ttl!r}")
    return encoded(tokens)

  def _store(self, prefix: Prefix, key: bytes, held: list[int], dropped: list[int]) -> bool:
    """Notes a prefix, and the pages to `hold` and to `drop` for it; whether it was stored."""
    kept, sequence = self._kept, self._running(prefix.handle)[0]
    if kept.prefixes.full(sequence.namespace, key):
      evicted = kept.prefixes.evict_entry(kept.busy)
      if evicted is None:
        return False
      dropped += kept.given_up(evicted)
    count, known = len(key) // TOKEN_BYTES, len(held)
    pages = self._state.block_tables[sequence.row, : -(-count // self.config.page_size)]

    def keep(first: int) -> list[Held]:
      kept_pages, fresh = kept.holds.at(pages[first:].tolist())
      held.extend(fresh)
      return kept_pages

    released = kept.prefixes.store(
      sequence.namespace, key, keep, last_logits=prefix.last_logits, ttl=prefix.ttl,
      pinned=prefix.pinned, busy=kept.busy,
    )  # fmt: skip
    if released is None:
      return False
    dropped += kept.holds.forget(released)
    self._event("stored", sequence.request_id, len(held) - known, count)
    return True

  def pin(
    self, tokens: Sequence[int] | np.ndarray, namespace: Hashable = None, *, pinned: bool = True
  ) -> bool:
    """Pins or unpins a stored sequence; False if there is no such one."""
    with self._lock:
      return self._kept.prefixes.pin(namespace, encoded(tokens), pinned)

  def evict_prefixes(self, count: int) -> int:
    """Removes up to `count` stored sequences that nobody uses; returns how many."""
    count = whole("count", count)
    with self._transition():
      done = 0
      while done < count:
        released = self._kept.prefixes.evict_entry(self._kept.busy)
        if released is None:
          break
        self._kept.evicted(released)
        done += 1
      return done

  def clear_prefixes(self, *, pinned: bool = True, reset_counters: bool = False) -> int:
    """Forgets every prefix, also those in use; sequences keep what they use.

    Args:
      pinned: Whether pinned ones go, too.
      reset_counters: Whether `prefix_stats` begins anew.

    Returns:
      How many stored sequences are gone.
    """
    with self._transition():
      prefixes = self._kept.prefixes
      before = prefixes.num_entries
      self._kept.drop(prefixes.clear() if pinned else prefixes.clear_unpinned())
      if reset_counters:
        self._lookups = dict.fromkeys(self._lookups, 0)
        self._forgotten = self._kept.count["evicted_pages"]
      self._event("removed", None, 0, 0)
      return before - prefixes.num_entries

  # Swap

  def swap_out(self, handle: Handle) -> None:
    """Moves a sequence to host memory and gives its row away; see `swap_out_many`."""
    self.swap_out_many([handle])

  def swap_out_many(self, handles: Sequence[Handle]) -> None:
    """Moves sequences to host memory, all or none.

    A page that a row or the prefix cache still uses stays where it is, held for the sequence; it
    moves when it has no such user and room is needed. Whoever shares a page, it moves once.

    Raises:
      Disabled: Swapping is off.
      SwappedOut: It is there already.
      OutOfHostPages: The host pool has no room.
    """
    with self._transition():
      self._check_swapping()
      running = [self._running(handle) for handle in handles]
      rows = [row for _, row in running]
      if len(set(rows)) != len(rows):
        raise ValueError(f"handles must be distinct, got {list(handles)}")
      self._check_host_room(rows)
      for sequence, row in running:
        sequence.start = int(self._state.starts[row])
        sequence.length = int(self._state.lengths[row])
        sequence.held, fresh = self._kept.holds.at(self._mapped(row))
        self._state.apply_ids("hold", fresh)
        for each in sequence.held:
          each.swapped += 1
        sequence.row, sequence.tokens = None, self._recorded(row).copy()
      self._free(rows)
      for row in rows:
        heapq.heappush(self._rows, row)
      moved = dict.fromkeys(each for sequence, _ in running for each in sequence.held)
      self._kept.to_host([each for each in moved if self._kept.stranded(each)], set())
      for sequence, _ in running:
        self._event("swapped_out", sequence.request_id, len(sequence.held), sequence.length)

  def _check_swapping(self) -> None:
    if not self.options.swapping:
      raise errors.Disabled("swapping")

  def _check_host_room(self, rows: list[int]) -> None:
    """Raises unless the pages that only these rows and swapped sequences use fit in the host pool."""
    state = self._state
    pages, entries = np.unique(
      [page for row in rows for page in self._mapped(row)], return_counts=True
    )
    moving = 0
    for page, count in zip(pages.tolist(), entries.tolist()):
      held = self._kept.holds.by_page.get(page)
      others = int(state.refcount[page]) - count - (held is not None)
      moving += others == 0 and (held is None or not held.indexed)
    room = self._kept.host_room(set())
    if moving > room:
      raise errors.OutOfHostPages(needed=moving, free=room)

  def swap_in(self, handle: Handle) -> None:
    """Brings a sequence back into a row; see `swap_in_many`."""
    self.swap_in_many([handle])

  def swap_in_many(self, handles: Sequence[Handle]) -> None:
    """Brings sequences back, all or none, bit for bit.

    Raises:
      NotSwappedOut: It is on the device.
      OutOfRows, OutOfPages: There is no room.
    """
    with self._transition():
      self._check_swapping()
      sequences = [self._sequence(handle) for handle in handles]
      for sequence in sequences:
        if sequence.row is not None:
          raise errors.NotSwappedOut(sequence.request_id)
      if len(sequences) > len(self._rows):
        raise errors.OutOfRows(needed=len(sequences), free=len(self._rows))
      if len(set(map(id, sequences))) != len(sequences):
        raise ValueError(f"handles must be distinct, got {list(handles)}")
      held = dict.fromkeys(each for sequence in sequences for each in sequence.held)
      away = [each for each in held if each.page is None]
      self._kept.make_room(len(away), set(held))
      self._kept.to_device(away)
      starts = []
      for sequence in sequences:
        sequence.row = row = heapq.heappop(self._rows)
        sequence.last_access = self._clock()
        self._know(row, sequence.tokens)
        starts.append((row, sequence.held, sequence.start, sequence.length))
      self._adopt(starts)
      for sequence in sequences:
        for each in sequence.held:
          each.swapped -= 1
        self._kept.drop(list(dict.fromkeys(each for each in sequence.held if not each.kept)))
        self._event("swapped_in", sequence.request_id, len(sequence.held), sequence.length)
        sequence.held = []
      if not self.config.copy_on_write:  # adopted by whole pages
        lengths = self._state.lengths.copy()
        for row, _, _, length in starts:
          lengths[row] = length
        self._kept.apply("trim", lengths)

  # Room

  def gc(self, target: int | None = None) -> Collected:
    """Evicts what nobody uses, least wanted first, until `target` pages are free.

    Args:
      target: Pages; the low watermark by default.
    """
    with self._transition():
      began, entries, free = (
        time.perf_counter(),
        self._kept.prefixes.num_entries,
        self._state.num_free,
      )
      if target is None:
        target = int(np.ceil(self.options.low_watermark * self.config.num_pages))
      self._kept.collect(target, set())
      freed = self._state.num_free - free
      return Collected(
        num_pages=freed,
        num_bytes=freed * self._state.config.page_bytes,
        num_entries=entries - self._kept.prefixes.num_entries,
        seconds=time.perf_counter() - began,
      )

  def check_pressure(self) -> pressure.Level:
    """The level now."""
    with self._transition():
      return self._level()

  def on_pressure(self, callback: pressure.Callback) -> Callable[[], None]:
    """Calls `callback(change)` whenever the level changes; returns what ends that.

    It runs in the thread that changed the level, after the transition and outside the lock, so
    it may call anything here. What it raises is logged.
    """
    with self._lock:
      return self._notifier.subscribe(callback)

  # Looking

  def _sequence(self, handle: Handle) -> _Sequence:
    sequence = self._sequences.get(handle.request_id)
    if sequence is None or sequence.handle is not handle:
      raise errors.StaleHandle(handle.request_id, handle.cache_id)
    return sequence

  def _running(self, handle: Handle) -> tuple[_Sequence, int]:
    sequence, row = self._sequence(handle), self._row(handle)
    sequence.last_access = self._clock()
    return sequence, row

  def _row(self, handle: Handle) -> int:
    """A running sequence's row; looking it up is no access."""
    sequence = self._sequence(handle)
    if sequence.row is None:
      raise errors.SwappedOut(sequence.request_id)
    return sequence.row

  def _mapped(self, row: int) -> list[int]:
    pages = self._state.block_tables[row]
    return pages[pages < self.config.num_pages].tolist()

  def is_valid(self, handle: Handle) -> bool:
    """Whether a handle's sequence is live."""
    with self._lock:
      sequence = self._sequences.get(handle.request_id)
      return sequence is not None and sequence.handle is handle

  def is_swapped(self, handle: Handle) -> bool:
    """Whether a sequence is in host memory."""
    with self._lock:
      return self._sequence(handle).row is None

  def is_shared(self, handle: Handle) -> bool:
    """Whether any page of a sequence has another holder."""
    with self._transition():
      _, row = self._running(handle)
      return bool((self._state.refcount[self._mapped(row)] > 1).any())

  def row(self, handle: Handle) -> int:
    """A sequence's row of the cache."""
    with self._lock:
      return self._running(handle)[1]

  def pages(self, handle: Handle) -> list[int]:
    """A sequence's physical pages in logical order."""
    with self._transition():
      return self._mapped(self._running(handle)[1])

  def block_table(self, handle: Handle) -> np.ndarray:
    """i32[P] a sequence's row of the block tables, N where there is no page."""
    with self._transition():
      return self._state.block_tables[self._running(handle)[1]].copy()

  def device(self, handle: Handle):
    """Where a sequence's pages are; the first device of several."""
    with self._lock:
      self._sequence(handle)
      return min(self._state.cache.pages.kv.devices(), key=lambda device: device.id)

  def config_of(self, handle: Handle) -> CacheConfig:
    """The cache that a live sequence is in."""
    with self._lock:
      self._sequence(handle)
      return self.config

  def page_at(self, handle: Handle, logical_page: int) -> int:
    """Physical page of a logical one."""
    with self._transition():
      sequence, row = self._running(handle)
      table = self._state.block_tables[row]
      if not 0 <= logical_page < len(table) or table[logical_page] == self.config.num_pages:
        token = logical_page * self.config.page_size
        raise errors.UnmappedToken(sequence.request_id, logical_page, token)
      return int(table[logical_page])

  def get_handle(self, request_id: Hashable) -> Handle:
    """The handle of a live request.

    Raises:
      UnknownRequest: There is none.
    """
    with self._lock:
      if request_id not in self._sequences:
        raise errors.UnknownRequest(request_id)
      return self._sequences[request_id].handle

  def list_handles(self) -> list[Handle]:
    """Handles of all live requests, oldest first."""
    with self._lock:
      return [each.handle for each in self._sequences.values()]

  def sequence_stats(self, handle: Handle) -> SequenceStats:
    """One sequence's numbers."""
    with self._transition():
      sequence, state, size = self._sequence(handle), self._state, self.config.page_size
      if sequence.row is None:
        start, length, pages = sequence.start, sequence.length, len(sequence.held)
        on_host = sum(each.page is None for each in sequence.held)
      else:
        start, length = int(state.starts[sequence.row]), int(state.lengths[sequence.row])
        pages, on_host = len(self._mapped(sequence.row)), 0
      return SequenceStats(
        num_tokens=length,
        num_pages=pages - on_host,
        num_host_pages=on_host,
        num_bytes=pages * state.config.page_bytes,
        utilization=(length - start) / (pages * size) if pages else 0.0,
        last_access=sequence.last_access,
      )

  @property
  def cache(self):
    """The cache as it is now; valid until the next method that changes it."""
    with self._lock:
      return self._state.cache

  @property
  def free_pages(self) -> int:
    """Pages without a holder, as in `stats`."""
    with self._transition():
      return self._state.num_free

  @property
  def available_pages(self) -> int:
    """Pages that are free, or would be for the asking."""
    with self._transition():
      return self._state.num_free + self._kept.reclaimable(set())

  def close(self) -> None:
    """Ends the thread that the manager may have; another one comes when it is needed."""
    with self._lock:
      self._state.close()

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def stats(self) -> Stats:
    """Exact numbers, as of now."""
    with self._transition():
      total, free = self.config.num_pages, self._state.num_free
      running = sum(each.row is not None for each in self._sequences.values())
      return Stats(
        num_pages=total,
        free_pages=free,
        used_pages=total - free,
        peak_pages=self._kept.peak,
        reclaimable_pages=self._kept.reclaimable(set()),
        utilization=(total - free) / total,
        page_bytes=self._state.config.page_bytes,
        num_host_pages=self._kept.holds.num_host_pages,
        free_host_pages=self._kept.holds.num_free,
        peak_host_pages=self._kept.holds.peak_used,
        running=running,
        swapped=len(self._sequences) - running,
        **self._count,
        **self._kept.count,
      )

  def prefix_stats(self) -> PrefixStats:
    """The prefix cache's numbers."""
    with self._lock:
      return PrefixStats(
        **self._lookups,
        evictions=self._kept.count["evicted_pages"] - self._forgotten,
        entries=self._kept.prefixes.num_entries,
        cached_tokens=self._kept.prefixes.num_tokens,
      )

  def events(self, since: int = 0) -> events.Batch:
    """What happened after event number `since`; see `events.Batch`."""
    with self._lock:
      return self._events.read(since)

  def _event(self, kind: str, request_id: Hashable, num_pages: int, num_tokens: int) -> None:
    self._events.add(kind, request_id, num_pages, num_tokens)

  def _left(self, kind: str, num_pages: int) -> None:
    self._events.add(kind, None, num_pages, num_pages * self.config.page_size)

  def _snapshot(self) -> dict[Hashable, int]:
    """Tokens of each live request."""
    return {each.request_id: self._length(each) for each in self._sequences.values()}

  def _length(self, sequence: _Sequence) -> int:
    return sequence.length if sequence.row is None else int(self._state.lengths[sequence.row])

  def audit(self) -> AuditReport:
    """Reconciles device, twin, what the host keeps, and the host pool. Reads the device."""
    with self._transition():
      state, total = self._state, self.config.num_pages
      device = jax.tree.map(int, state.verbs.audit(state.cache))
      leaves = zip(jax.tree.leaves(state.cache.ledger), jax.tree.leaves(state.ledger))
      differing = sum(not np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)
      kept = np.zeros(total, np.int32)
      kept[list(self._kept.holds.by_page)] = 1
      indexed: dict[Held, int] = {}
      swapped: dict[Held, int] = {}
      for each in (x for node in self._kept.prefixes.nodes() for x in node.held):
        indexed[each] = indexed.get(each, 0) + 1
      for each in (x for sequence in self._sequences.values() for x in sequence.held):
        swapped[each] = swapped.get(each, 0) + 1
      everything = {*indexed, *swapped, *self._kept.holds.by_page.values()}
      rows = [each.row for each in self._sequences.values() if each.row is not None]
      empty = set(np.flatnonzero(state.lengths == 0).tolist())
      return AuditReport(
        device=Audit(*device),
        twin=differing,
        holds=int((kept != state.holds).sum()),
        host_pages=abs(sum(x.image is not None for x in everything) - self._kept.holds.num_used),
        sequences=len(rows) - len(set(rows)) + len(set(self._rows) - empty)
        + abs(len(rows) + len(self._rows) - self.config.num_rows),
        users=sum(
          x.indexed != indexed.get(x, 0) or x.swapped != swapped.get(x, 0) for x in everything
        ),
      )  # fmt: skip


_NOTHING = Match(0, None, [])
