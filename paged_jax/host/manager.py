"""The manager: a counter over desks. Here are its public names, their docstrings and the lock.

It speaks to the cache in verbs only, decides everything on the host's ledger, and so never waits for
the device. One lock covers each change; callbacks run after it. Axis letters as in types.py.

    # Manager ─┬─ admission   allocate, extend, trim, slide, deallocate
    #          ├─ sharing     share_prefix, clone, cow_copy
    #          ├─ prefixes    find, store, pin, clear      ── prefix (the tree)
    #          ├─ swap        swap_out, swap_in
    #          ├─ tensors     write_kv, read_kv
    #          ├─ reclaim     gc, evict_prefixes: all eviction
    #          ├─ forecast    what programs would take
    #          └─ report      stats, audit
    # all on    sequences (who is live), kept (the host's pages), turn (one change), state (the cache)
"""

import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from paged_jax import jitted
from paged_jax.config import CacheConfig
from paged_jax.host import events, pressure, report
from paged_jax.host.admission import Admission
from paged_jax.host.config import ManagerConfig, Request, whole
from paged_jax.host.forecast import Forecast
from paged_jax.host.kept import Kept
from paged_jax.host.prefix import Match, PrefixIndex, encoded
from paged_jax.host.prefixes import Prefix, Prefixes, PrefixStats
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Handle, Sequences
from paged_jax.host.sharing import Sharing
from paged_jax.host.state import State, Ticket
from paged_jax.host.swap import Swap
from paged_jax.host.tensors import Tensors
from paged_jax.host.turn import Turn
from paged_jax.types import Cache


class Manager:
  """Paged KV cache manager. Safe to call from several threads.

  A method that changes something may raise any error of `paged_jax.host.errors`, and then has changed
  no sequence. While a program is unreported (see `run`), the next method waits for its report, unless
  its docstring says otherwise.

  >>> from paged_jax import CacheConfig
  >>> from paged_jax.host import Manager, Request
  >>> manager = Manager(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=8,
  ...                               num_rows=2, max_length=64))
  >>> handle = manager.allocate(Request("a", tokens=range(20)))
  >>> manager.store_prefix(handle), manager.free_pages
  (True, 6)
  >>> manager.deallocate("a")
  >>> manager.free_pages, manager.available_pages  # the prefix keeps two pages, which may be evicted
  (6, 8)

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
    self.options = options = ManagerConfig() if options is None else options
    stored = dataclasses.replace(config, num_layers=config.num_layers + options.canary)
    self._state = State(stored, verbs, shardings)
    self._kept = Kept(self._state, options)
    stream = events.Stream(options.event_buffer, lambda: self._sequences.lengths())
    self._turn = Turn(self._kept, config, options, stream)
    self._index = PrefixIndex(
      config.page_size,
      max_entries=options.max_prefixes if options.prefix_cache else 0,
      min_length=options.min_prefix_length,
      clock=clock,
    )
    self._sequences = Sequences(self._turn, clock)
    self._reclaim = Reclaim(self._kept, self._index, options, self._turn.left)
    self._prefixes = Prefixes(self._sequences, self._reclaim, self._index)
    self._admission = Admission(self._sequences, self._reclaim, self._prefixes)
    self._sharing = Sharing(self._sequences, self._reclaim, self._admission)
    self._swap = Swap(self._sequences, self._reclaim, self._admission)
    self._tensors = Tensors(self._sequences, self._sharing)
    self._forecast = Forecast(self._sequences, self._reclaim, self._admission, self._prefixes)

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits until everything that the manager asked of the device is done."""
    with self._turn.change():
      jax.block_until_ready(self._state.cache)

  # Beginning, growing, ending

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
    with self._turn.change(wait=wait):
      return self._admission.allocate(self, requests, reserve, spare)

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
    with self._turn.change():
      self._admission.extend(num_tokens)

  def trim(self, handle: Handle, num_tokens: int) -> None:
    """A sequence keeps its first `num_tokens` tokens, and releases whole pages behind them.

    Raises:
      UnmappedToken: It does not hold that many, or has slid past them.
    """
    with self._turn.change():
      self._admission.cut("trim", handle, whole("num_tokens", num_tokens))

  def slide(self, handle: Handle, start: int) -> None:
    """A sequence forgets its tokens before `start`, and releases whole pages before them.

    Raises:
      UnmappedToken: It does not reach that far.
    """
    with self._turn.change():
      self._admission.cut("slide", handle, whole("start", start))

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
    with self._turn.change(wait=wait or self.options.scrub):
      self._admission.deallocate(request_ids)

  def can_allocate(self, request: Request) -> bool:
    """Whether `allocate` would succeed now. Pages of prefixes that nobody uses count as free."""
    with self._turn.change():
      return self._admission.fits(request)

  # Sharing

  def share_prefix(self, source: Handle, target: Handle, num_tokens: int) -> None:
    """The empty `target` gets the first tokens of `source`, on the same pages.

    Raises:
      NotEmpty: The target holds tokens.
      UnmappedToken: The source does not hold that many.
      Disabled: Part of a page would be shared, and copy-on-write is off.
    """
    with self._turn.change():
      self._sharing.share(source, target, whole("num_tokens", num_tokens))

  def clone(self, handle: Handle, request_id: Hashable, *, num_tokens: int | None = None) -> Handle:
    """A new sequence that shares the pages of `handle`'s first `num_tokens`, by default of all."""
    length = None if num_tokens is None else whole("num_tokens", num_tokens)
    with self._turn.change():
      return self._sharing.clone(self, handle, request_id, length)

  def cow_copy(self, handle: Handle, first_page: int = 0) -> list[int]:
    """Makes the logical pages from `first_page` on the sequence's own; returns its pages.

    Shared ones are copied, remapped and released, so that tokens on them may be rewritten.

    Raises:
      Disabled: Copy-on-write is off.
      OutOfPages: There is no room for the copies.
    """
    with self._turn.change():
      return self._sharing.own_pages(handle, whole("first_page", first_page, 0))

  # Prefixes

  def find_prefix(self, tokens: Sequence[int] | np.ndarray, namespace: Hashable = None) -> Match:
    """The longest stored prefix of `tokens`; counts as a use. `allocate` looks for itself."""
    with self._turn.lock:
      return self._prefixes.find(namespace, encoded(tokens))

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
    with self._turn.change(wait=wait):
      return self._prefixes.store(prefixes)

  def pin(
    self, tokens: Sequence[int] | np.ndarray, namespace: Hashable = None, *, pinned: bool = True
  ) -> bool:
    """Pins or unpins a stored sequence; False if there is no such one."""
    with self._turn.lock:
      return self._index.pin(namespace, encoded(tokens), pinned)

  def evict_prefixes(self, count: int) -> int:
    """Removes up to `count` stored sequences that nobody uses; returns how many."""
    count = whole("count", count)
    with self._turn.change():
      return self._reclaim.evict_entries(count)

  def clear_prefixes(self, *, pinned: bool = True, reset_counters: bool = False) -> int:
    """Forgets every prefix, also those in use; sequences keep what they use.

    Args:
      pinned: Whether pinned ones go, too.
      reset_counters: Whether `prefix_stats` begins anew.

    Returns:
      How many stored sequences are gone.
    """
    with self._turn.change():
      return self._prefixes.clear(pinned=pinned, reset_counters=reset_counters)

  def prefix_stats(self) -> PrefixStats:
    """The prefix cache's numbers."""
    with self._turn.lock:
      return self._prefixes.stats()

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
    with self._turn.change():
      self._swap.out(handles)

  def swap_in(self, handle: Handle) -> None:
    """Brings a sequence back into a row; see `swap_in_many`."""
    self.swap_in_many([handle])

  def swap_in_many(self, handles: Sequence[Handle]) -> None:
    """Brings sequences back, all or none, bit for bit.

    Raises:
      NotSwappedOut: It is on the device.
      OutOfRows, OutOfPages: There is no room.
    """
    with self._turn.change():
      self._swap.back(handles)

  # Bytes

  def write_kv(self, handle: Handle, layer: int, position: int, k, v) -> None:
    """Writes keys and values [B,H,D] (or [H,D] for one token) of tokens from `position` on.

    A page that others hold, and those behind it, are copied first, so that only this sequence sees
    the write.

    Raises:
      UnmappedToken: The sequence does not hold all of these tokens.
      ShapeMismatch: Keys or values have another shape.
    """
    k, v = self._tensors.checked(k, v)
    layer, position = self._tensors.layer(layer), whole("position", position)
    with self._turn.change():
      self._tensors.write(handle, layer, position, k, v)

  def read_kv(
    self, handle: Handle, layer: int, start: int, num_tokens: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [num_tokens,H,D] in token order, on the host; waits for the device.

    Raises:
      UnmappedToken: The sequence does not hold all of these tokens.
      CanaryMismatch: In canary mode, a slot is not what this sequence wrote.
    """
    layer, start = self._tensors.layer(layer), whole("start", start)
    num_tokens = whole("num_tokens", num_tokens)
    with self._turn.change():
      read = self._tensors.read(handle, layer, start, num_tokens)
    return read()  # waits, outside the lock

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
    with self._turn.lock:
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
    with self._turn.change(last=ticket):
      return self._state.num_free

  def record(self, tokens: np.ndarray, num_tokens: np.ndarray) -> None:
    """Notes what sequences came to hold, so that `store_prefix` knows it.

    Args:
      tokens: i32[K,S] new tokens of each row, one step a line.
      num_tokens: i32[S] how many of them, from the first line on, are a row's.
    """
    with self._turn.lock:
      self._sequences.record(tokens, num_tokens)

  def warm_up(self) -> None:
    """Compiles what sequences come, go, share and move with; nothing changes."""
    with self._turn.change():
      options = self.options
      swapping = options.swapping and options.num_host_pages > 0
      holding = options.swapping or options.prefix_cache
      self._state.warm_up(holding=holding, swapping=swapping, scrubbing=options.scrub)

  # What a program may take. These do not wait for reports, see `forecast`.

  @property
  def num_free(self) -> int:
    """Free pages, without waiting."""
    return self._state.num_free

  @property
  def num_free_rows(self) -> int:
    """Rows without a sequence."""
    return len(self._sequences.rows)

  @property
  def num_copies(self) -> int:
    """Pages copied on write, by the manager's verbs and by reported programs."""
    return self._state.ledger.num_copies

  @property
  def num_mapped(self) -> int:
    """Pages that rows map, a shared one once for each row."""
    with self._turn.lock:
      return self._forecast.num_mapped

  @property
  def num_idle(self) -> int:
    """Pages that only the host holds; eviction frees at most so many."""
    with self._turn.lock:
      return self._forecast.num_idle

  @property
  def num_reclaimable(self) -> int:
    """Pages that eviction could free."""
    with self._turn.lock:
      return self._reclaim.reclaimable

  def pages_to_begin(self, tokens: Sequence[int] | np.ndarray) -> int:
    """Pages that `allocate` would take for these tokens, besides those in the prefix cache."""
    with self._turn.lock:
      return self._forecast.to_begin(tokens)

  def pages_to_reach(self, lengths: np.ndarray) -> int:
    """Pages that rows take, copies included, to grow to `lengths` i32[S] tokens, if they have fewer."""
    with self._turn.lock:
      return self._forecast.to_reach(lengths)

  def pages_to_search(self, handles: Sequence[Handle], length: int, shared: int) -> int:
    """Most pages that sequences take to grow to `length` tokens each while they `reorder` among
    themselves, but keep sharing their first `shared` tokens."""
    with self._turn.lock:
      return self._forecast.to_search(handles, length, shared)

  # Room

  def gc(self, target: int | None = None) -> report.Collected:
    """Evicts what nobody uses, least wanted first, until `target` pages are free.

    Args:
      target: Pages; the low watermark by default.
    """
    if target is None:
      target = int(np.ceil(self.options.low_watermark * self.config.num_pages))
    with self._turn.change():
      began, entries, free = time.perf_counter(), self._index.num_entries, self._state.num_free
      self._reclaim.collect(target)
      freed = self._state.num_free - free
      return report.Collected(
        num_pages=freed,
        num_bytes=freed * self._state.config.page_bytes,
        num_entries=entries - self._index.num_entries,
        seconds=time.perf_counter() - began,
      )

  def check_pressure(self) -> pressure.Level:
    """The level now."""
    with self._turn.change():
      return self._turn.level()

  def on_pressure(self, callback: pressure.Callback) -> Callable[[], None]:
    """Calls `callback(change)` whenever the level changes; returns what ends that.

    It runs in the thread that changed the level, after the transition and outside the lock, so
    it may call anything here. What it raises is logged.
    """
    with self._turn.lock:
      return self._turn.notifier.subscribe(callback)

  @property
  def free_pages(self) -> int:
    """Pages without a holder, as in `stats`."""
    with self._turn.change():
      return self._state.num_free

  @property
  def available_pages(self) -> int:
    """Pages that are free, or could be freed by eviction."""
    with self._turn.change():
      return self._admission.available

  # Looking

  @property
  def cache(self) -> Cache:
    """The cache as it is now; valid until the next method that changes it."""
    with self._turn.lock:
      return self._state.cache

  def get_handle(self, request_id: Hashable) -> Handle:
    """The handle of a live request.

    Raises:
      UnknownRequest: There is none.
    """
    with self._turn.lock:
      return self._sequences.get(request_id)

  def list_handles(self) -> list[Handle]:
    """Handles of all live requests, oldest first."""
    with self._turn.lock:
      return list(self._sequences.by_id.values())

  def stats(self) -> report.Stats:
    """Exact numbers, as of now."""
    with self._turn.change():
      return report.stats(self._sequences, self._admission, self._reclaim)

  def events(self, since: int = 0) -> events.Batch:
    """What happened after event number `since`; see `events.Batch`."""
    with self._turn.lock:
      return self._turn.events.read(since)

  def audit(self) -> report.AuditReport:
    """Reconciles device, twin, what the host keeps, and the host pool. Reads the device."""
    with self._turn.change():
      return report.audit(self._sequences, self._index, self._reclaim)
