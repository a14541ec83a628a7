"""The manager: a counter over desks. This file has its public names, their docstrings and the lock.

A method takes the lock and passes the work to one desk. Desks decide on the host's ledger and
change the cache by verbs only, so they never read the device. Callbacks run after the lock is
released. Axis letters as in types.py.

    # Manager ─┬─ admission   allocate, extend, trim, slide, deallocate
    #          ├─ sharing     share_prefix, clone, cow_copy
    #          ├─ prefixes    find, store, clear
    #          ├─ persistence save, load
    #          ├─ swap        swap_out, swap_in
    #          ├─ tensors     write_kv, read_kv
    #          ├─ pools       pin, gc, evict_prefixes  ── prefix (a tree), reclaim (eviction)
    #          ├─ forecast    pages that programs would take
    #          └─ report      stats, audit
    # below     sequences (live ones), kept (held pages), turn (one change), state (the cache)
"""

import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from paged_jax import cache as cache_lib
from paged_jax import groups, jitted
from paged_jax.config import CacheConfig
from paged_jax.host import events, pressure, report
from paged_jax.host.admission import Admission
from paged_jax.host.config import ManagerConfig, Request, whole
from paged_jax.host.forecast import Forecast
from paged_jax.host.kept import Kept
from paged_jax.host.persistence import Persisted, Persistence
from paged_jax.host.pools import Pools
from paged_jax.host.prefix import Match, encoded
from paged_jax.host.prefixes import Prefix, Prefixes, PrefixStats
from paged_jax.host.reclaim import Collected
from paged_jax.host.sequences import Handle, Sequences
from paged_jax.host.sharing import Sharing
from paged_jax.host.state import State, Ticket
from paged_jax.host.store import Store
from paged_jax.host.swap import Swap
from paged_jax.host.tensors import Tensors
from paged_jax.host.turn import Turn


class Manager:
  """Paged KV cache manager. Safe to call from several threads.

  A method that raises an error of `paged_jax.host.errors` has changed no sequence. A method first
  waits for the reports of programs that are under way (see `run`), except `num_*`, `pages_to_*` and
  those whose docstring says so.

  >>> from paged_jax import CacheConfig
  >>> from paged_jax.host import Manager, Request
  >>> manager = Manager(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=8,
  ...                               num_rows=2, max_length=64))
  >>> handle = manager.allocate(Request("a", tokens=range(20)))
  >>> manager.store_prefix(handle), manager.free_pages
  (True, 6)
  >>> manager.deallocate("a")
  >>> manager.free_pages, manager.available_pages  # the prefix keeps two pages, until evicted
  (6, 8)

  Args:
    config: Sizes and dtypes of the cache; a tuple for a model with several groups of layers. Then
      pages, numbers of pages and `stats` are tuples too, with a value for each group, in what
      methods take and return; the docstrings speak of one group.
    options: How the manager behaves.
    clock: Returns seconds, for lifetimes of prefixes and access times.
    shardings: Where the cache lives, from `paged_jax.sharding.shardings`; None = one device.
    verbs: The compiled verbs.
  """

  def __init__(
    self,
    config: CacheConfig | tuple[CacheConfig, ...],
    options: ManagerConfig | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    shardings: Any = None,
    verbs=jitted,
  ):
    self.config, configs = config, groups.each(cache_lib.stored(config))
    self.options = options = ManagerConfig() if options is None else options
    options.check(configs)
    stored = [dataclasses.replace(x, num_layers=x.num_layers + options.canary) for x in configs]
    self._state = State(groups.like(config, stored), verbs, shardings)
    kept = [Kept(self._state, group, options) for group in range(len(configs))]
    stream = events.Stream(options.event_buffer, lambda: self._sequences.lengths())
    self._turn = Turn(kept, configs, options, stream)
    self._sequences = Sequences(self._turn, clock)
    self._pools = Pools(kept, options, self._turn.left, clock)
    self._turn.tidy = self._pools.tidy
    self._prefixes = Prefixes(self._sequences, self._pools)
    self._persistence = Persistence(self._turn, self._pools)
    self._admission = Admission(self._sequences, self._pools, self._prefixes)
    self._sharing = Sharing(self._sequences, self._pools, self._admission)
    self._swap = Swap(self._sequences, self._pools, self._admission)
    self._tensors = Tensors(self._sequences, self._sharing)
    self._forecast = Forecast(self._sequences, self._admission, self._prefixes)

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    if error is None:  # otherwise waiting might hide it behind an error of its own
      self.close()

  def close(self) -> None:
    """Waits until the device has done all work that the manager asked for.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> with manager:  # calls `close` at the end
    ...   handle = manager.allocate(host.Request("a", 20))
    """
    with self._turn.change():
      jax.block_until_ready(self._state.cache)

  # Beginning, growing, ending

  def allocate(self, request: Request) -> Handle:
    """Begins one sequence; see `allocate_many`.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", initial_tokens=20))
    >>> handle.num_tokens, handle.pages
    (20, [0, 1])
    """
    return self.allocate_many([request])[0]

  def allocate_many(
    self, requests: Sequence[Request], *, reserve: Any = 0, spare: Any = 0, wait: bool = True
  ) -> list[Handle]:
    """Begins sequences, all or none, in one call of each verb.

    A sequence starts on the longest cached prefix of its tokens. Such prefixes are not evicted for
    these requests, except if there is no room otherwise. If the prefix cache has all tokens of a
    request and their logits, nothing is left to compute, and `handle.last_logits` has the logits.
    Otherwise at least the last token is left to compute.

    Args:
      requests: One for each new sequence.
      reserve: Pages that must be free afterwards.
      spare: If prefixes must be evicted, this many pages more are evicted at once.
      wait: Whether to wait for the reports of programs. If False, `reserve` must include the pages
        that these programs may still take, and the new sequences' pages are known only after the
        reports.

    Raises:
      DuplicateRequest: A live sequence has the id, or two requests have the same.
      ShapeMismatch: A request has other layers, heads, head dim or dtype than the pool.
      TooLong: A request starts with more tokens than it may hold.
      OutOfRows, OutOfPages: There is no room; `needed` includes the reserve.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handles = manager.allocate_many([host.Request("a", 20), host.Request("b", 5)])
    >>> [handle.pages for handle in handles]
    [[0, 1], [2]]
    """
    room = self._turn.by_group("reserve", reserve), self._turn.by_group("spare", spare)
    with self._turn.change(wait=wait):
      return self._admission.allocate(self, requests, *room)

  def extend(self, handle: Handle, num_tokens: int) -> None:
    """Makes room for `num_tokens` more tokens; a shared, partly filled tail page is copied first.

    A cache with a window gives up the pages that no later token sees.

    Raises:
      StaleHandle, SwappedOut: The sequence ended, or is in host memory.
      TooLong: The sequence would hold more tokens than it may.
      OutOfPages: Too few pages are available.
      Disabled: A page must be copied, and copy-on-write is off.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.extend(handle, 13)
    >>> handle.num_tokens, handle.pages
    (33, [0, 1, 2])
    """
    self.extend_many({handle: num_tokens})

  def extend_many(
    self,
    num_tokens: Mapping[Handle, int],
    *,
    reserve: Any = 0,
    spare: Any = 0,
    wait: bool = True,
  ) -> None:
    """Makes room in several sequences, all or none, in one call; see `extend` and `allocate_many`.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> a, b = manager.allocate_many([host.Request("a", 20), host.Request("b", 5)])
    >>> manager.extend_many({a: 13, b: 1})
    >>> a.num_tokens, b.num_tokens
    (33, 6)
    """
    room = self._turn.by_group("reserve", reserve), self._turn.by_group("spare", spare)
    with self._turn.change(wait=wait):
      self._admission.extend(num_tokens, *room)

  def trim(self, handle: Handle, num_tokens: int) -> None:
    """Cuts a sequence to its first `num_tokens` tokens, and releases the whole pages after them.

    Raises:
      UnmappedToken: The sequence holds fewer tokens, or has slid past these, or a window has passed
        some that the next token would see (see `begins`).

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.trim(handle, 16)
    >>> handle.num_tokens, handle.pages
    (16, [0])
    """
    with self._turn.change():
      self._admission.cut("trim", handle, whole("num_tokens", num_tokens))

  def slide(self, handle: Handle, start: int) -> None:
    """Forgets a sequence's tokens before `start`, and releases the whole pages before it.

    Raises:
      UnmappedToken: The sequence holds fewer tokens than `start`.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.slide(handle, 16)
    >>> handle.num_tokens, handle.pages  # positions stay as they were
    (20, [1])
    """
    with self._turn.change():
      self._admission.cut("slide", handle, whole("start", start))

  def deallocate(self, request_id: Hashable) -> None:
    """Ends a sequence and gives up its pages, on the device or in host memory.

    A page becomes free if no other sequence and no prefix uses it.

    Raises:
      UnknownRequest: No live sequence has this id.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.deallocate("a")
    >>> handle.is_valid, manager.free_pages
    (False, 8)
    """
    self.deallocate_many([request_id])

  def deallocate_many(self, request_ids: Sequence[Hashable], *, wait: bool = True) -> None:
    """Ends several sequences, all or none, in one call.

    Args:
      request_ids: Their ids, all distinct.
      wait: Whether to wait for the reports of programs. If False, no program that is run later may
        use the rows of these sequences. Scrub mode always waits.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> a, b = manager.allocate_many([host.Request("a", 20), host.Request("b", 5)])
    >>> manager.deallocate_many(["a", "b"])
    >>> manager.free_pages
    8
    """
    with self._turn.change(wait=wait or self.options.scrub):
      self._admission.deallocate(request_ids)

  def can_allocate(self, request: Request) -> bool:
    """Whether `allocate` would succeed now; pages that can be evicted count as room.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> manager.can_allocate(host.Request("a", 64)), manager.can_allocate(host.Request("a", 65))
    (True, False)
    """
    with self._turn.change():
      return self._admission.fits(request)

  # Sharing

  def share_prefix(self, source: Handle, target: Handle, num_tokens: int) -> None:
    """Puts the first tokens of `source` into the empty `target`, on the same pages.

    Raises:
      NotEmpty: The target holds tokens.
      UnmappedToken: The source does not hold that many tokens, or cannot be cut there (see `begins`).
      Disabled: Part of a page would be shared, and copy-on-write is off.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> other = manager.allocate(host.Request("b"))
    >>> manager.share_prefix(handle, other, 16)
    >>> handle.pages, other.pages
    ([0, 1], [0])
    """
    with self._turn.change():
      self._sharing.share(source, target, whole("num_tokens", num_tokens))

  def clone(self, handle: Handle, request_id: Hashable, *, num_tokens: int | None = None) -> Handle:
    """Begins a sequence that shares the pages of `handle`'s first `num_tokens` tokens; None = all.

    No page is copied until one of the two sequences writes into it.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> copy = manager.clone(handle, "b")
    >>> manager.extend(copy, 1)  # copies the shared tail page
    >>> handle.pages, copy.pages
    ([0, 1], [0, 2])
    """
    length = None if num_tokens is None else whole("num_tokens", num_tokens)
    with self._turn.change():
      return self._sharing.clone(self, handle, request_id, length)

  def cow_copy(self, handle: Handle, first_page: int = 0) -> list[int]:
    """Copies the shared ones of a sequence's pages, from logical page `first_page` on.

    Where groups have other page sizes, the page is one of the first group.

    Afterwards no other sequence or prefix uses these pages, so their tokens may be rewritten.

    Returns:
      The sequence's pages.

    Raises:
      UnmappedToken: The sequence has no such page.
      Disabled: Copy-on-write is off.
      OutOfPages: There is no room for the copies.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> copy = manager.clone(handle, "b")
    >>> manager.cow_copy(copy, 1)
    [0, 2]
    """
    with self._turn.change():
      return self._sharing.own_pages(handle, whole("first_page", first_page, 0))

  # Prefixes

  def find_prefix(self, tokens: Sequence[int] | np.ndarray, namespace: Hashable = None) -> Match:
    """The longest stored prefix of `tokens`; it counts as used. Does not wait for reports.

    A cache with a window has only the last pages of a stored prefix: it is found at its end, or as
    near to it as these pages allow. `allocate` does its own lookup.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.find_prefix(range(30)).length
    20
    """
    key = encoded(tokens)
    with self._turn.change(wait=False):
      return self._prefixes.find(namespace, key)

  def store_prefix(
    self,
    handle: Handle,
    tokens: Sequence[int] | np.ndarray | None = None,
    *,
    last_logits: Any = None,
    ttl: float | None = None,
    pinned: bool = False,
  ) -> bool:
    """Keeps the pages of a sequence's first tokens, for later requests to start on.

    Args:
      handle: The sequence; it may go on and end as usual.
      tokens: The tokens that it holds, from position 0 on; None = all that the manager knows.
      last_logits: Given to a request for exactly these tokens. None keeps those stored before.
      ttl: Seconds until the prefix is forgotten; None = never.
      pinned: Whether the prefix stays until `pin` releases it.

    Returns:
      Whether the prefix was stored. It is not if it is too short, if a window has passed tokens that
      a row needs to go on from its end, or if the prefix cache is full and all its prefixes are
      pinned or in use.

    Raises:
      UnmappedToken: The sequence holds fewer tokens, or has slid.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle, ttl=60)
    True
    >>> manager.deallocate("a")
    >>> manager.allocate(host.Request("b", tokens=range(30))).num_cached
    20
    """
    return self.store_prefixes([Prefix(handle, tokens, last_logits, ttl, pinned)])[0]

  def store_prefixes(self, prefixes: Sequence[Prefix], *, wait: bool = True) -> list[bool]:
    """Keeps the pages of several prefixes, in order, in one call of each verb.

    Args:
      prefixes: See `store_prefix`.
      wait: Whether to wait for the reports of programs. If False, the pages of these sequences must
        be known: no program before their last growth is unreported, and none since takes pages of
        the prefixes from them, as a copy on write, a trim or a window would.

    Returns:
      Whether each prefix was stored.

    Raises:
      UnmappedToken: A sequence holds fewer tokens, or has slid; nothing is stored.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefixes([host.Prefix(handle), host.Prefix(handle, range(4))])  # too short
    [True, False]
    """
    with self._turn.change(wait=wait):
      return self._prefixes.store(prefixes)

  def pin(
    self, tokens: Sequence[int] | np.ndarray, namespace: Hashable = None, *, pinned: bool = True
  ) -> bool:
    """Pins or unpins a stored prefix; False if there is none. Does not wait for reports.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.pin(range(20))
    True
    >>> manager.deallocate("a")
    >>> manager.evict_prefixes(1)  # pinned
    0
    """
    key = encoded(tokens)
    with self._turn.change(wait=False):
      return self._pools.pin(namespace, key, pinned)

  def evict_prefixes(self, count: int) -> int:
    """Removes up to `count` stored prefixes that no sequence uses; returns how many.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.evict_prefixes(1)  # a sequence uses it
    0
    >>> manager.deallocate("a")
    >>> manager.evict_prefixes(1)
    1
    """
    count = whole("count", count)
    with self._turn.change():
      return self._pools.evict_prefixes(count)

  def clear_prefixes(self, *, pinned: bool = True, reset_counters: bool = False) -> int:
    """Forgets every prefix, those in use too; sequences keep the pages that they use.

    Args:
      pinned: Whether pinned prefixes are forgotten too.
      reset_counters: Whether the numbers of `prefix_stats` start from zero again.

    Returns:
      How many stored prefixes were forgotten.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.clear_prefixes(), handle.pages
    (1, [0, 1])
    """
    with self._turn.change():
      return self._prefixes.clear(pinned=pinned, reset_counters=reset_counters)

  def prefix_stats(self) -> PrefixStats:
    """The prefix cache's numbers. Does not wait for reports.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.find_prefix(range(30)).length
    20
    >>> stats = manager.prefix_stats()
    >>> stats.queries, stats.hits, stats.tokens_hit  # `allocate` asked first
    (2, 1, 20)
    """
    with self._turn.lock:
      return self._prefixes.stats()

  def save_prefixes(self, store: Store, fingerprint: str) -> Persisted:
    """Puts every stored prefix into a store; sequences go on meanwhile.

    Args:
      store: `FileStore(folder)`, or another one.
      fingerprint: Names the weights that computed the pages: others have another one.

    Raises:
      OSError: The store takes no more; what was in it is as before.

    >>> import tempfile
    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.save_prefixes(host.FileStore(tempfile.mkdtemp()), "weights 1").num_prefixes
    1
    """
    return self._persistence.save(store, fingerprint)

  def load_prefixes(self, store: Store, fingerprint: str) -> Persisted:
    """Stores the prefixes of a store again, with their pins and what is left of their lifetimes.

    They take free pages only, and leave those of the low watermark free; with `spill` the others
    take free host pages. A prefix of other weights, of another layout, or damaged is a miss, and one
    line of the log says why.

    >>> import tempfile
    >>> from paged_jax import CacheConfig, host
    >>> config = CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64)
    >>> manager, restarted = host.Manager(config), host.Manager(config)
    >>> store = host.FileStore(tempfile.mkdtemp())
    >>> manager.store_prefix(manager.allocate(host.Request("a", tokens=range(20))))
    True
    >>> manager.save_prefixes(store, "weights 1") and restarted.load_prefixes(store, "weights 1")[:2]
    (1, 2)
    >>> restarted.find_prefix(range(30)).length
    20
    """
    return self._persistence.load(store, fingerprint)

  # Swap

  def swap_out(self, handle: Handle) -> None:
    """Moves a sequence to host memory, and frees its row; see `swap_out_many`.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.swap_out(handle)
    >>> handle.is_swapped, manager.free_pages
    (True, 8)
    """
    self.swap_out_many([handle])

  def swap_out_many(self, handles: Sequence[Handle]) -> None:
    """Moves sequences to host memory, all or none, and frees their rows.

    A page that another row or the prefix cache uses stays on the device, held for the sequence. It
    moves later, if room is needed and only swapped sequences use it. A page moves once, however
    many sequences share it.

    Raises:
      Disabled: Swapping is off.
      SwappedOut: A sequence is in host memory already.
      OutOfHostPages: The host pool has no room.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handles = manager.allocate_many([host.Request("a", 20), host.Request("b", 5)])
    >>> manager.swap_out_many(handles)
    >>> manager.stats().swapped, manager.stats().free_host_pages
    (2, 509)
    """
    with self._turn.change():
      self._swap.out(handles)

  def swap_in(self, handle: Handle) -> None:
    """Brings a sequence back into a row; see `swap_in_many`.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.swap_out(handle)
    >>> manager.swap_in(handle)
    >>> handle.is_swapped, handle.num_tokens
    (False, 20)
    """
    self.swap_in_many([handle])

  def swap_in_many(self, handles: Sequence[Handle]) -> None:
    """Brings sequences back into rows, all or none. Every bit is as it was.

    Raises:
      NotSwappedOut: A sequence is on the device.
      OutOfRows, OutOfPages: There is no room.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handles = manager.allocate_many([host.Request("a", 20), host.Request("b", 5)])
    >>> manager.swap_out_many(handles)
    >>> manager.swap_in_many(handles)
    >>> manager.stats().running
    2
    """
    with self._turn.change():
      self._swap.back(handles)

  # Bytes

  def write_kv(
    self, handle: Handle, layer: int, position: int, k: Any, v: Any = None, *, group: int = 0
  ) -> None:
    """Writes keys and values [B,H,D] of the tokens from `position` on; [H,D] for one token.

    `layer` is the number of a layer in its `group`. Where values are part of keys, `v` is None.
    Pages from there on that others use too are copied first, so only this sequence sees the write.

    Raises:
      UnmappedToken: The sequence does not hold all of these tokens.
      ShapeMismatch: Keys or values have another shape.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> import numpy as np
    >>> manager.write_kv(handle, 0, 4, np.ones((2, 1, 4)), np.ones((2, 1, 4)))
    >>> k, v = manager.read_kv(handle, 0, 3, 4)
    >>> k[:, 0, 0].tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    layer, group = self._tensors.layer(layer, group)
    k, v = self._tensors.checked(group, k, v)
    position = whole("position", position)
    with self._turn.change():
      self._tensors.write(handle, group, layer, position, k, v)

  def read_kv(
    self, handle: Handle, layer: int, start: int, num_tokens: int, *, group: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [num_tokens,H,D] on the host, in token order. Waits for the device.

    Raises:
      UnmappedToken: The sequence does not hold all of these tokens.
      CanaryMismatch: In canary mode, a slot does not have what this sequence wrote.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> k, v = manager.read_kv(handle, layer=0, start=3, num_tokens=4)
    >>> k.shape, v.shape
    ((4, 1, 4), (4, 1, 4))
    """
    layer, group = self._tensors.layer(layer, group)
    start, num_tokens = whole("start", start), whole("num_tokens", num_tokens)
    with self._turn.change():
      read = self._tensors.read(handle, group, layer, start, num_tokens)
    return read()  # waits for the device, outside the lock

  # Programs of the user's own

  def run(self, program: Callable, *args, **kwargs) -> Ticket:
    """Runs `program(cache, *args, **kwargs)`, which returns (cache, log, result). Does not wait.

    The cache is donated if the program says so. `log` is the program's report: a `paged_jax.Log` of
    every ledger verb that it ran. `settle`, or the next method that waits for reports, reads it.
    The caller ensures that enough pages are free for the program (`available_pages`, `gc`).

    Returns:
      A ticket: `ticket.result` is the program's `result`, and `settle(ticket)` takes over its
      report.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> import jax, numpy as np, paged_jax
    >>> def grow(cache, num_tokens):
    ...   cache, info = paged_jax.extend(cache, num_tokens)
    ...   return cache, paged_jax.Log(((num_tokens[None],),), ("extend",)), info.ok
    >>> ticket = manager.run(jax.jit(grow), np.array([13, 0], np.int32))
    >>> manager.settle(ticket), handle.pages, ticket.result.tolist()
    (5, [0, 1, 2], [True, True])
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
    """Waits for the reports of a program and of those before it, and takes them over.

    Args:
      ticket: What `run` returned; None = the newest one.
      tokens: The tokens that came with the reports, for `record`; with `num_tokens` or not at all.
      num_tokens: See `record`.

    Returns:
      Free pages after the last of these reports.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> manager.settle()  # no program is under way
    8
    """
    if (tokens is None) != (num_tokens is None):
      raise ValueError("tokens and num_tokens must be given together")
    with self._turn.change(last=ticket):
      if tokens is not None and num_tokens is not None:
        if ticket is not None and ticket.recorded:
          raise ValueError("tokens of this ticket are recorded already")
        self._sequences.record(tokens, num_tokens)
        if ticket is not None:
          ticket.recorded = True
      return self._like(self._state.num_free)

  def record(self, tokens: np.ndarray, num_tokens: np.ndarray) -> None:
    """Notes the new tokens of sequences, so that `store_prefix` knows them. Does not wait.

    Args:
      tokens: i32[K,S] new tokens of each row, step by step.
      num_tokens: i32[S] how many of these each row has, from the first step on.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> import numpy as np
    >>> manager.extend(handle, 1)
    >>> manager.record(np.array([[71, 0]]), np.array([1, 0]))  # row 0 now ends in token 71
    >>> manager.store_prefix(handle), manager.find_prefix([*range(20), 71]).length
    (True, 21)
    """
    with self._turn.lock:
      self._sequences.record(tokens, num_tokens)

  def warm_up(self) -> None:
    """Compiles all verbs that the manager uses; changes nothing.

    >>> from paged_jax import CacheConfig, host
    >>> config = CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64)
    >>> manager = host.Manager(config, host.ManagerConfig(num_host_pages=0))
    >>> manager.warm_up()
    """
    with self._turn.change():
      self._pools.warm_up(self.options)

  # What a program may take. None of these waits for reports; see `forecast`.

  def _like(self, values: Sequence[Any]) -> Any:
    """Values of all groups: a tuple if the manager has several, or one."""
    return self._state.like(values)

  @property
  def num_free(self) -> Any:
    """Free pages."""
    with self._turn.lock:
      return self._like(self._state.num_free)

  @property
  def num_free_rows(self) -> int:
    """Rows without a sequence."""
    return len(self._sequences.rows)

  @property
  def num_copies(self) -> int:
    """Pages of all groups copied on write, by the manager's verbs and by reported programs."""
    with self._turn.lock:
      return self._state.ledger.num_copies

  @property
  def num_mapped(self) -> int:
    """Pages of all groups that rows map; a shared page counts once for each row."""
    with self._turn.lock:
      return self._forecast.num_mapped

  @property
  def num_idle(self) -> Any:
    """Pages that only the host uses; eviction frees at most this many."""
    with self._turn.lock:
      return self._like([reclaim.num_idle for reclaim in self._pools.reclaims])

  @property
  def num_reclaimable(self) -> Any:
    """Pages that eviction could free."""
    with self._turn.lock:
      return self._like([reclaim.reclaimable for reclaim in self._pools.reclaims])

  def pages_to_begin(self, tokens: Sequence[int] | np.ndarray, *, step: int | None = None) -> Any:
    """Pages that `allocate` would take for these tokens, beyond those in the prefix cache.

    With `step`, most pages that it has at once if it grows by so many tokens at a time: a group
    with a window gives up pages meanwhile.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.pages_to_begin(range(30)), manager.pages_to_begin(range(1, 31))
    (1, 2)
    """
    with self._turn.change(wait=False):
      return self._like(self._forecast.to_begin(tokens, step))

  def pages_to_reach(self, lengths: np.ndarray, *, step: int | None = None) -> Any:
    """Pages that rows would take, copies included, to grow to `lengths` i32[S] tokens.

    A row that has more tokens already takes none. `step` is as in `pages_to_begin`.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> import numpy as np
    >>> manager.pages_to_reach(np.array([33, 0]))
    1
    """
    with self._turn.lock:
      return self._like(self._forecast.to_reach(lengths, step))

  def pages_to_search(self, handles: Sequence[Handle], length: int, shared: int) -> Any:
    """Most pages that a beam search over these sequences would take.

    They grow to `length` tokens each, `reorder` among themselves, and keep sharing their first
    `shared` tokens.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> copy = manager.clone(handle, "b")
    >>> manager.pages_to_search([handle, copy], length=40, shared=20)
    3
    """
    with self._turn.lock:
      return self._like(self._forecast.to_search(handles, length, shared))

  # Room

  def gc(self, target: Any = None) -> Collected:
    """Evicts pages that no row uses, in the policy's order, until `target` pages are free.

    Args:
      target: Pages, or those of each group; None = as many as the low watermark asks for.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> manager.deallocate("a")
    >>> manager.gc(target=8).num_pages
    2
    """
    targets: Sequence[int | None] = [None] * len(self._turn.configs)
    if target is not None:
      targets = self._turn.by_group("target", target)
    with self._turn.change():
      return self._pools.collect(targets)

  def check_pressure(self) -> pressure.Level:
    """The pressure level now.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> manager.check_pressure().name
    'LOW'
    >>> handles = manager.allocate_many([host.Request("a", 64), host.Request("b", 64)])
    >>> manager.check_pressure().name
    'CRITICAL'
    """
    with self._turn.change():
      return self._turn.level()

  def on_pressure(self, callback: pressure.Callback) -> Callable[[], None]:
    """Calls `callback(change)` after each change of the pressure level.

    The callback runs in the thread that changed the level, outside the lock, so it may call any
    method. An error that it raises is logged.

    Returns:
      A function that ends the calls.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> stop = manager.on_pressure(lambda change: print(change.entered.name, change.num_free))
    >>> handle = manager.allocate(host.Request("a", 64))
    >>> manager.allocate(host.Request("b", 32)).num_tokens
    MEDIUM 2
    32
    >>> stop()
    """
    with self._turn.lock:
      return self._turn.notifier.subscribe(callback)

  @property
  def free_pages(self) -> Any:
    """Pages that nothing uses."""
    with self._turn.change():
      return self._like(self._state.num_free)

  @property
  def available_pages(self) -> Any:
    """Pages that are free, or could be freed by eviction."""
    with self._turn.change():
      return self._like(self._pools.available)

  # Looking

  @property
  def cache(self) -> Any:
    """The cache now, valid until the next method that changes it. Does not wait for reports."""
    with self._turn.lock:
      return self._state.cache

  def get_handle(self, request_id: Hashable) -> Handle:
    """The handle of a live sequence. Does not wait for reports.

    Raises:
      UnknownRequest: No live sequence has this id.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.get_handle("a") is handle
    True
    """
    with self._turn.lock:
      return self._sequences.get(request_id)

  def list_handles(self) -> list[Handle]:
    """The handles of all live sequences, oldest first. Does not wait for reports.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> [handle.request_id for handle in manager.list_handles()]
    ['a']
    """
    with self._turn.lock:
      return list(self._sequences.by_id.values())

  def stats(self) -> Any:
    """The manager's numbers, exact at the time of the call.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> stats = manager.stats()
    >>> stats.running, stats.used_pages, stats.free_pages
    (1, 2, 6)
    """
    with self._turn.change():
      return self._like(report.stats(self._sequences, self._admission, self._pools))

  def events(self, since: int = 0) -> events.Batch:
    """What happened after event number `since`; see `events.Batch`. Does not wait for reports.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
    >>> manager.store_prefix(handle)
    True
    >>> [(event.kind, event.num_pages) for event in manager.events().events]
    [('stored', 2)]
    """
    with self._turn.lock:
      return self._turn.events.read(since)

  def audit(self) -> report.AuditReport:
    """Compares the device, the host's ledger, held pages and the host pool. Reads the device.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> manager.audit().clean
    True
    """
    with self._turn.change():
      return report.audit(self._sequences, self._pools)
