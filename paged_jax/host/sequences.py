"""Live sequences: each has one `Handle`, which is its record, and which callers pass to name it.

# request  ──▶ Handle ──▶ a row of the cache                  running
#                     └─▶ held pages                          swapped out
"""

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from paged_jax import groups
from paged_jax.host import errors
from paged_jax.host.config import whole
from paged_jax.host.holds import Held, latest_start
from paged_jax.host.turn import Turn


class SequenceStats(NamedTuple):
  """One sequence's numbers.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> stats = manager.allocate(host.Request("a", 24)).stats()
  >>> stats.num_pages, stats.num_bytes, stats.utilization
  (2, 512, 0.75)
  """

  num_tokens: int
  num_pages: int  # of all groups, on the device, shared ones included
  num_host_pages: int
  num_bytes: int  # of all its pages
  utilization: float  # tokens / (pages * page size)
  last_access: float  # seconds, of the manager's clock


class Clones(Protocol):
  """The part of a manager that a handle uses."""

  def clone(
    self, handle: "Handle", request_id: Hashable, *, num_tokens: int | None = None
  ) -> "Handle":
    """See `Manager.clone`."""
    ...


class Handle:
  """A live sequence. After `deallocate`, every use of the handle raises `StaleHandle`.

  Fields to read: `request_id`; `num_cached`, the tokens that the prefix cache gave; `last_logits`,
  if the prefix cache had all tokens and their logits, else None. `page_size`, `num_layers`,
  `num_kv_heads`, `head_dim` and `required_pages` are those of the first group of caches.

  >>> from paged_jax import CacheConfig
  >>> from paged_jax.host import Manager, Request
  >>> manager = Manager(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=8,
  ...                               num_rows=2, max_length=64))
  >>> handle = manager.allocate(Request("a", 20))
  >>> handle.num_tokens, handle.pages, handle.required_pages(33)
  (20, [0, 1], 3)
  """

  __slots__ = (
    "_desk", "cache_id", "held", "last_access", "last_logits", "length", "manager", "marked_at",
    "max_length", "namespace", "num_cached", "place", "request_id", "starts", "tokens", "writers",
  )  # fmt: skip

  def __init__(
    self,
    desk: "Sequences",
    manager: Clones,
    request_id: Hashable,
    *,
    place: int,
    max_length: int,
    namespace: Hashable,
  ):
    self._desk, self.manager = desk, manager
    self.request_id, self.cache_id = request_id, next(desk.cache_ids)
    self.namespace, self.max_length = namespace, max_length
    self.num_cached = 0
    self.last_logits: Any = None
    # Written by the manager:
    self.last_access = desk.clock()
    self.place: int | None = place  # its row, None while it is swapped out
    self.writers: list[list[int | None]] = []  # who wrote each token, by group, in canary mode
    self.marked_at = 0  # `state.num_reports` when `writers` was last right
    # While it is swapped out:
    self.tokens: Sequence[int] | np.ndarray = ()  # its recorded tokens
    self.length = 0
    self.starts: tuple[int, ...] = ()  # its first live token in each group
    self.held: tuple[list[Held], ...] = ()  # its pages in each group

  def __repr__(self) -> str:
    return f"Handle({self.request_id!r}, cache_id={self.cache_id})"

  @property
  def is_valid(self) -> bool:
    """Whether the sequence is live."""
    return self._desk.by_id.get(self.request_id) is self

  @property
  def num_tokens(self) -> int:
    """Tokens that the sequence holds."""
    return self.stats().num_tokens

  @property
  def row(self) -> int:
    """The sequence's row of the cache, for your own plans."""
    with self._desk.turn.lock:
      return self._desk.running(self)

  @property
  def pages(self) -> Any:
    """Physical pages in logical order, a list; with several groups a tuple of lists."""
    with self._desk.turn.change():
      row = self._desk.running(self)
      return self._desk.like([self._desk.mapped(row, group) for group in self._desk.groups])

  @property
  def block_table(self) -> Any:
    """i32[P] the sequence's row of the block tables; N where it has no page."""
    with self._desk.turn.change():
      row = self._desk.running(self)
      return self._desk.like([book.block_tables[row].copy() for book in self._desk.ledger.groups])

  def page_at(self, logical_page: int, group: int = 0) -> int:
    """Physical page of a logical page in a group.

    Raises:
      UnmappedToken: The sequence has no such page.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> handle.page_at(1)
    1
    """
    group = self._desk.group(group)
    table, config = groups.each(self.block_table)[group], self._desk.configs[group]
    if not 0 <= logical_page < len(table) or table[logical_page] == config.num_pages:
      raise self._desk.unmapped(self, logical_page * config.page_size, group)
    return int(table[logical_page])

  @property
  def is_shared(self) -> bool:
    """Whether any of the sequence's pages has another holder."""
    with self._desk.turn.change():
      row = self._desk.running(self)
      pages = (self._desk.mapped(row, group) for group in self._desk.groups)
      return any(
        (book.refcount[own] > 1).any() for book, own in zip(self._desk.ledger.groups, pages)
      )

  @property
  def is_swapped(self) -> bool:
    """Whether the sequence is in host memory."""
    with self._desk.turn.lock:
      return self._desk.live(self).place is None

  @property
  def device(self):
    """The device of the pages; the first of several."""
    with self._desk.turn.lock:
      self._desk.live(self)
      devices = self._desk.turn.state.cache_of(0).pages.kv.devices()
      return min(devices, key=lambda device: device.id)

  @property
  def page_size(self) -> int:
    """Tokens per page."""
    return self._desk.live(self)._desk.config.page_size

  @property
  def num_layers(self) -> int:
    """Layers of a page."""
    return self._desk.live(self)._desk.config.num_layers

  @property
  def num_kv_heads(self) -> int:
    """KV heads of a layer."""
    return self._desk.live(self)._desk.config.num_kv_heads

  @property
  def head_dim(self) -> int:
    """Values in a key, and in a value."""
    return self._desk.live(self)._desk.config.head_dim

  def required_pages(self, num_tokens: int) -> int:
    """Pages that `num_tokens` tokens fill.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> handle.required_pages(32), handle.required_pages(33)
    (2, 3)
    """
    return -(-num_tokens // self.page_size)

  def begins(self, num_tokens: int) -> bool:
    """Whether the sequence could be cut to its first tokens, or shared up to there.

    It cannot if a window has passed tokens that the next one would see. Does not wait for reports.

    >>> from paged_jax import CacheConfig, host
    >>> config = CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64, window=16)
    >>> manager = host.Manager(config)
    >>> handle = manager.allocate(host.Request("a", 40))
    >>> manager.extend(handle, 1)
    >>> handle.begins(40), handle.begins(39)
    (True, False)
    """
    with self._desk.turn.change(wait=False):
      return self._desk.begins(self._desk.place(self), num_tokens)

  def stats(self) -> SequenceStats:
    """This sequence's numbers.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> handle.stats().num_tokens, handle.stats().num_bytes
    (20, 512)
    """
    with self._desk.turn.change():
      return self._desk.stats(self)

  def clone(self, request_id: Hashable) -> "Handle":
    """Begins a sequence that shares all pages of this one; see `Manager.clone`.

    >>> from paged_jax import CacheConfig, host
    >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
    >>> handle = manager.allocate(host.Request("a", 20))
    >>> copy = handle.clone("b")
    >>> copy.pages, handle.is_shared
    ([0, 1], True)
    """
    return self.manager.clone(self, request_id)


class Sequences:
  """The live sequences and their rows. Not thread-safe: callers are inside a `turn.change`.

  Args:
    turn: The manager's.
    clock: Returns seconds, for access times.
  """

  def __init__(self, turn: Turn, clock: Callable[[], float]):
    self.turn, self.clock = turn, clock
    self.configs, self.ledger = turn.configs, turn.state.ledger
    self.config = turn.configs[0]  # what all groups share is in each
    self.groups, self.like = range(len(turn.configs)), turn.state.like
    self.by_id: dict[Hashable, Handle] = {}
    self.cache_ids = itertools.count(1)
    self.rows = list(range(self.config.num_rows))  # a heap of the free rows
    width = self.ledger.capacity + 1  # the last column takes surplus
    self._tokens = np.zeros((self.config.num_rows, width), np.int32)
    self._known = np.zeros(self.config.num_rows, np.int32)  # recorded tokens of each row

  # Handles

  def live(self, handle: Handle) -> Handle:
    """The handle; raises unless its sequence is live."""
    if self.by_id.get(handle.request_id) is not handle:
      raise errors.StaleHandle(handle.request_id, handle.cache_id)
    return handle

  def place(self, handle: Handle) -> int:
    """A running sequence's row; does not count as an access."""
    row = self.live(handle).place
    if row is None:
      raise errors.SwappedOut(handle.request_id)
    return row

  def running(self, handle: Handle) -> int:
    """A running sequence's row; counts as an access."""
    row = self.place(handle)
    handle.last_access = self.clock()
    return row

  def distinct(self, handles: Sequence[Handle]) -> None:
    """Raises if a handle is named twice."""
    if len(set(map(id, handles))) != len(handles):
      raise ValueError(f"handles must be distinct, got {list(handles)}")

  def get(self, request_id: Hashable) -> Handle:
    """The handle of a live request."""
    if request_id not in self.by_id:
      raise errors.UnknownRequest(request_id)
    return self.by_id[request_id]

  def group(self, group: int) -> int:
    """The number of a group as an int; raises if there is no such group."""
    if not 0 <= whole("group", group) < len(self.configs):
      raise ValueError(f"group must be in [0, {len(self.configs)}), got {group}")
    return int(group)

  # Rows

  def begin(
    self, manager: Clones, request_id: Hashable, max_length: int | None, namespace: Hashable
  ) -> Handle:
    """Begins a sequence in a free row; there must be one."""
    handle = Handle(
      self, manager, request_id, place=heapq.heappop(self.rows), namespace=namespace,
      max_length=self.ledger.capacity if max_length is None else max_length,
    )  # fmt: skip
    self.by_id[request_id] = handle
    return handle

  def occupy(self, handle: Handle) -> int:
    """Gives a swapped sequence a free row; there must be one."""
    handle.place = row = heapq.heappop(self.rows)
    handle.last_access = self.clock()
    self.know(row, handle.tokens)
    return row

  def vacate(self, row: int) -> None:
    """Makes a row free."""
    heapq.heappush(self.rows, row)

  def mapped(self, row: int, group: int) -> list[int]:
    """The pages of a row in a group, in order."""
    book = self.ledger.groups[group]
    pages = book.block_tables[row]
    return pages[pages < book.num_pages].tolist()

  def starts(self, row: int) -> tuple[int, ...]:
    """First live token of a row in each group."""
    return tuple(int(book.starts[row]) for book in self.ledger.groups)

  def slid(self, row: int) -> bool:
    """Whether a row has lost tokens, other than those that windows have passed."""
    starts = zip(self.starts(row), self.configs)
    return any(start > 0 for start, config in starts if config.window is None)

  def begins(self, row: int, num_tokens: int) -> bool:
    """Whether the first `num_tokens` tokens of a row can go on alone, as after a trim."""
    if not 0 < num_tokens <= self.ledger.lengths[row]:
      return num_tokens == 0
    return all(
      start <= latest_start(num_tokens, config.window, otherwise=num_tokens)
      for start, config in zip(self.starts(row), self.configs)
    )

  def unmapped(self, handle: Handle, token: int, group: int = 0) -> errors.UnmappedToken:
    """The error for a token that a sequence does not hold in a group."""
    page = token // self.configs[group].page_size
    return errors.UnmappedToken(handle.request_id, page, token)

  def length(self, handle: Handle) -> int:
    """Tokens that a sequence holds."""
    return handle.length if handle.place is None else int(self.ledger.lengths[handle.place])

  def lengths(self) -> dict[Hashable, int]:
    """Tokens of each live request."""
    return {name: self.length(handle) for name, handle in self.by_id.items()}

  def stats(self, handle: Handle) -> SequenceStats:
    """One sequence's numbers."""
    self.live(handle)
    if handle.place is None:
      starts, length, pages = handle.starts, handle.length, [len(x) for x in handle.held]
      on_host = sum(each.page is None for own in handle.held for each in own)
    else:
      starts, length, on_host = self.starts(handle.place), self.length(handle), 0
      pages = [len(self.mapped(handle.place, group)) for group in self.groups]
    stored = self.turn.state.configs
    slots = sum(count * config.page_size for count, config in zip(pages, stored))
    return SequenceStats(
      num_tokens=length,
      num_pages=sum(pages) - on_host,
      num_host_pages=on_host,
      num_bytes=sum(count * config.page_bytes for count, config in zip(pages, stored)),
      utilization=sum(length - start for start in starts) / slots if slots else 0.0,
      last_access=handle.last_access,
    )

  # Recorded tokens: those that the manager knows, from position 0 on

  def know(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
    """Records `tokens` as the tokens of a row, in place of all before."""
    self._known[row] = len(tokens)
    self._tokens[row, : len(tokens)] = tokens

  def known(self, row: int, num_tokens: int | None = None) -> np.ndarray:
    """The first `num_tokens` recorded tokens of a row; None = all."""
    known = int(self._known[row])
    return self._tokens[row, : known if num_tokens is None else min(known, num_tokens)]

  def forget(self, row: int, length: int) -> None:
    """Forgets a row's recorded tokens from `length` on."""
    self._known[row] = min(self._known[row], length)

  def record(self, tokens: np.ndarray, num_tokens: np.ndarray) -> None:
    """Adds to each row the first `num_tokens` i32[S] of its new tokens i32[K,S]."""
    known, capacity = self._known, self._tokens.shape[1] - 1
    num_tokens = np.minimum(num_tokens, capacity - known).astype(np.int32)
    rows = np.flatnonzero(num_tokens)
    columns = np.minimum(known[rows, None] + np.arange(len(tokens)), capacity)
    self._tokens[rows[:, None], columns] = tokens[:, rows].T  # surplus goes to the last column
    self._known = known + num_tokens

  def audit(self, used: Iterable[int]) -> int:
    """How many rows are wrong: free and `used`, or of two sequences, or of none and not free."""
    rows = [each.place for each in self.by_id.values() if each.place is not None]
    free = set(self.rows)
    return (
      len(rows) - len(set(rows))
      + len(free.intersection(used))
      + abs(len(rows) + len(self.rows) - self.config.num_rows)
    )  # fmt: skip
