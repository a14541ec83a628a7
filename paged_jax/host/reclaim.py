"""All eviction: which held pages may leave the device, which leaves next, and where it goes.

A held page may leave if neither it nor a page after it is busy (a row uses it), guarded (the
change under way needs it) or pinned. Pages leave from the ends of branches:

    # page size 4     [a][b][c] ┬ [d][e]      e is busy: d, c, b and a are blocked
    #                           └ [f][g]      g leaves first, then f

Where a page goes depends on what uses it:

    # prefix index only            index ──▶ free
    # a swapped sequence too       index, sequence ──▶ sequence, in host memory (if there is room)
    # with `spill`                 index ──▶ index, in host memory (while there is room)

The counts change as pages and nodes change, so no question visits the whole index.
"""

import collections
import contextlib
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from paged_jax.host import errors
from paged_jax.host.config import ManagerConfig
from paged_jax.host.eviction import Policy, Queue
from paged_jax.host.holds import Held
from paged_jax.host.kept import Kept
from paged_jax.host.prefix import Node, PrefixIndex

# Kinds of held pages:
#   stays       it may not leave
#   freeable    on the device, only the index uses it: dropping it frees a device page
#   movable     on the device, a swapped sequence uses it: moving it to the host frees a device page
#   droppable   in host memory, only the index uses it: dropping it frees a host page
#   covered     as droppable, once the device pages after it are gone
_STAYS, _FREEABLE, _MOVABLE, _DROPPABLE, _COVERED = range(5)


class Collected(NamedTuple):
  """What `Manager.gc` did.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> manager.gc(8)[:3]  # all pages are free
  (0, 0, 0)
  """

  num_pages: int  # that became free
  num_bytes: int  # of these pages
  num_entries: int  # stored prefixes that are gone
  seconds: float


@dataclasses.dataclass(eq=False, slots=True)
class _Count:
  """What `Evictable` knows of a node of the prefix index.

  # pages      [a][b][c][d]      b is busy: reach 2, a and b are blocked
  # on device   x  x     x       last 3; covered 3: a, b and c have a device page after them
  """

  reach: int = 0  # the first `reach` pages of the node are blocked
  covered: int = 0  # the first `covered` pages of the node have a device page after them
  last: int = -1  # number of the node's last device page, -1 if it has none
  used_children: int = 0  # children with a blocked page in or below them
  device_children: int = 0  # children with a device page in or below them
  used: bool = False  # the node counts in its parent's `used_children`
  device: bool = False  # the node counts in its parent's `device_children`
  parent: Node | None = None  # the node in which this one counts
  tail: Node | None = None  # the node below that has the last page of this pinned node
  tails: int = 0  # pinned nodes above whose last page is this node's first
  marked: bool = False  # the node waits in the heap to be counted again


class Evictable:
  """Which pages of the prefix index may leave, how many, and in which order.

  Changes only mark the nodes that they touch; `settle` counts these again before an answer.

  Args:
    prefixes: The index; this object becomes its `edited` callback.
    policy: The order in which nodes leave.
    used: Whether a row uses the end of the prefix that ends at a node; None = ask the page there.
  """

  def __init__(
    self, prefixes: PrefixIndex, policy: Policy, used: Callable[[Node], bool] | None = None
  ):
    self._prefixes = prefixes
    self._used = used or (lambda node: prefixes.end_of(node)[1].busy)
    prefixes.edited = self.edited
    self._marked: list = []  # heap of (-start, number, node): nodes to count again, deepest first
    self._numbers = itertools.count()
    self._moved: set[Held] = set()  # pages whose kind may have changed
    self._kinds = [0] * 5
    self.stranded: dict[Held, None] = {}  # device pages that only swapped sequences use
    self.num_busy = 0
    self._leaves: Queue[Node] = Queue(policy, prefixes.tick, self._gives)
    self._spilled: Queue[Node] = Queue(policy, prefixes.tick, self._drops)
    self._entries: Queue[Node] = Queue(policy, prefixes.tick, _evictable_entry)

  # Changes

  def edited(self, node: Node, first: int) -> None:
    """The pages of a node from number `first` on, its children or its entry are about to change."""
    if node.parent is None:  # a root has no pages
      return
    count = self._of(node)
    for each in node.held[first : count.reach]:
      each.blocked -= 1
    for each in node.held[first : count.covered]:
      each.covered -= 1
    self._moved.update(node.held[first:])
    count.reach, count.covered = min(count.reach, first), min(count.covered, first)
    self._mark(node)
    if node.entry is not None:
      self._entries.push(node)
    # The last tokens of a node above may be on this node's first page.
    above, size = node.parent, self._prefixes.page_size
    while above is not None and above.end % size and above.end // size == node.start // size:
      if above.entry is not None and above.entry.pinned:
        self._mark(above)
      above = above.parent

  def changed(self, held: Held) -> None:
    """A page moved, or its users changed."""
    self._moved.add(held)
    for node in held.nodes:
      self._mark(node)

  def set_busy(self, held: Held, busy: bool) -> None:
    """Notes whether a row uses a page."""
    if held.busy != busy:
      held.busy = busy
      self.num_busy += 1 if busy else -1
      self.changed(held)

  def guard(self, held: Iterable[Held], change: int = 1) -> None:
    """Guards pages, which then stay where they are; `change` -1 takes the guard back."""
    for each in held:
      each.guards += change
      self.changed(each)

  def _of(self, node: Node) -> _Count:
    """The counts of a node."""
    if node.count is None:
      node.count = _Count()
    return node.count

  def _mark(self, node: Node) -> None:
    """Notes that a node must be counted again."""
    count = self._of(node)
    if not count.marked and node.parent is not None:
      count.marked = True
      heapq.heappush(self._marked, (-node.start, next(self._numbers), node))

  # Counting

  def settle(self) -> None:
    """Counts the marked nodes again, children before parents, and then the changed pages."""
    while self._marked:
      node = heapq.heappop(self._marked)[2]
      self._of(node).marked = False
      self._recount(node)
    for held in self._moved:
      self._sort(held)
    self._moved.clear()

  def _recount(self, node: Node) -> None:
    """Counts a node again: its blocked and covered pages, and what its parent counts."""
    count, held, size = self._of(node), node.held, len(node.held)
    attached = node.attached
    pinned = attached and node.entry is not None and node.entry.pinned
    self._move_tail(count, self._prefixes.end_of(node)[0] if pinned else node, node)
    if pinned or count.used_children:
      reach = size
    else:
      needed = (i + 1 for i in reversed(range(size)) if held[i].busy or held[i].guards)
      reach = next(needed, min(count.tails, 1, size))
    count.last = next((i for i in reversed(range(size)) if held[i].page is not None), -1)
    covered = size if count.device_children else max(count.last, 0)
    for i in range(min(reach, count.reach), max(reach, count.reach)):
      held[i].blocked += 1 if reach > count.reach else -1
      self._moved.add(held[i])
    for i in range(min(covered, count.covered), max(covered, count.covered)):
      held[i].covered += 1 if covered > count.covered else -1
      self._moved.add(held[i])
    count.reach, count.covered = reach, covered
    used = attached and bool(pinned or count.used_children or reach)
    device = attached and bool(count.device_children or count.last >= 0)
    self._count_in(node.parent if attached else None, count, used, device)
    if self._gives(node):
      self._leaves.push(node)
    if self._drops(node):
      self._spilled.push(node)

  def _move_tail(self, count: _Count, tail: Node, node: Node) -> None:
    """Notes that the last page of a pinned node is in the node `tail`, so that `tail` blocks it."""
    now = None if tail is node else tail  # its own pages are blocked anyway
    if now is not count.tail:
      for each, change in ((count.tail, -1), (now, 1)):
        if each is not None:
          self._of(each).tails += change
          self._mark(each)
      count.tail = now

  def _count_in(self, parent: Node | None, count: _Count, used: bool, device: bool) -> None:
    """Counts a node in its parent; `parent` is None if the node left the tree."""
    if parent is not count.parent:
      self._add(count.parent, -count.used, -count.device)
      count.used = count.device = False
    self._add(parent, used - count.used, device - count.device)
    count.parent, count.used, count.device = parent, used, device

  def _add(self, parent: Node | None, used: int, device: int) -> None:
    """Adds to a parent's counts of children; marks it if it now has some, or none any more."""
    if parent is not None and (used or device):
      count = self._of(parent)
      before = bool(count.used_children), bool(count.device_children)
      count.used_children += used
      count.device_children += device
      if before != (bool(count.used_children), bool(count.device_children)):
        self._mark(parent)

  def _sort(self, held: Held) -> None:
    """Counts a page under its kind."""
    kind = _kind(held)
    self._kinds[held.kind] -= 1
    self._kinds[kind] += 1
    held.kind = kind
    if kind == _MOVABLE and not held.nodes:
      self.stranded[held] = None
    else:
      self.stranded.pop(held, None)

  def available(self, num_free_host: int) -> int:
    """Device pages that could become free, if `num_free_host` host pages are free."""
    host = num_free_host + self._kinds[_DROPPABLE] + self._kinds[_COVERED]
    return self._kinds[_FREEABLE] + min(self._kinds[_MOVABLE], host)

  @property
  def num_droppable(self) -> int:
    """Host pages that the index could give up now."""
    return self._kinds[_DROPPABLE]

  # Order

  def _gives(self, node: Node) -> bool:
    """Whether a node can give up its last device page: it is not blocked, and no other is below."""
    count = self._of(node)
    return node.attached and not count.device_children and count.reach <= count.last

  def _drops(self, node: Node) -> bool:
    """Whether a node can give up its last page, and this page is in host memory."""
    if not node.attached or node.children or not node.held or node.held[-1].page is not None:
      return False
    return self._of(node).reach < len(node.held)

  def next_leaf(self) -> Node | None:
    """The node that gives up its last device page next."""
    self.settle()
    return self._leaves.pop(self._gives)

  def next_spilled(self) -> Node | None:
    """The node that gives up a page in host memory next, its last one."""
    self.settle()
    return self._spilled.pop(self._drops)

  def leaving(self, node: Node, count: int) -> list[Held]:
    """Up to `count` device pages at the end of a node that may leave, the last one first."""
    pages = reversed(node.held[self._of(node).reach :])
    return [each for each in pages if each.page is not None][:count]

  def next_entry(self) -> Node | None:
    """The node whose stored prefix goes first; None if all are in use or pinned."""
    return self._entries.pop(lambda node: not self._used(node))

  def audit(self, kept: Iterable[Held], busy: set[Held]) -> int:
    """How many pages or nodes differ from a count of the whole index.

    Args:
      kept: All held pages.
      busy: Those that rows use.
    """
    self.settle()
    nodes = list(self._prefixes.nodes())
    pinned = {node for node in nodes if node.entry is not None and node.entry.pinned}
    tails = {self._prefixes.end_of(node)[0] for node in pinned}
    used, device, wrong = set(), set(), 0
    blocked, covered = collections.Counter[Held](), collections.Counter[Held]()
    queued = set(self._leaves)
    for node in reversed(nodes):  # children first
      whole = node in pinned or node in used  # all its pages are blocked
      reach = max((i + 1 for i, x in enumerate(node.held) if x in busy), default=0)
      reach = max(reach, node in tails)
      last = max((i for i, x in enumerate(node.held) if x.page is not None), default=-1)
      blocked.update(node.held if whole else node.held[:reach])
      covered.update(node.held if node in device else node.held[: max(last, 0)])
      gives = not whole and node not in device and reach <= last
      wrong += gives and node not in queued and node.parent is not None
      if whole or reach:
        used.add(node.parent)
      if node in device or last >= 0:
        device.add(node.parent)
    for each in kept:
      found = each.blocked, each.covered, each.busy, each.kind
      wrong += found != (blocked[each], covered[each], each in busy, _kind(each))
    return wrong


def _evictable_entry(node: Node) -> bool:
  """Whether a whole stored prefix ends at a node, and is not pinned."""
  return node.entry is not None and not node.entry.pinned


def _kind(held: Held) -> int:
  """The kind of a held page, see the top of the file."""
  if not (held.blocked or held.busy or held.guards):
    if held.page is not None and held.kept:
      return _MOVABLE if held.swapped else _FREEABLE
    if held.image is not None and held.nodes and not held.swapped:
      return _COVERED if held.covered else _DROPPABLE
  return _STAYS


class Reclaim:
  """Frees pages of a group that only the host uses. Not thread-safe.

  Args:
    kept: The held pages.
    prefixes: The prefix index.
    options: The manager's.
    event: Called with an event's kind and a number of pages when pages leave.
  """

  def __init__(
    self,
    kept: Kept,
    prefixes: PrefixIndex,
    options: ManagerConfig,
    event: Callable[[str, int], None],
  ):
    self._kept, self._prefixes, self._event = kept, prefixes, event
    self._book, self._options = kept.book, options
    self._evictable = Evictable(prefixes, options.eviction)
    kept.changed = self._changed

  # How much could be freed

  def _changed(self, held: Held) -> None:
    """A held page moved, or its users changed."""
    if held.page is None:  # no row uses an image
      self._evictable.set_busy(held, False)
    self._evictable.changed(held)

  def _settle(self) -> None:
    """Takes over from the ledger which held pages rows use, and counts."""
    book, evictable = self._book, self._evictable
    if book.touched:
      pages = np.fromiter(book.touched, np.int64, len(book.touched))
      busy = book.refcount[pages] > book.holds[pages]
      for page, used in zip(pages.tolist(), busy.tolist()):
        held = self._kept.by_page.get(page)
        if held is not None:
          evictable.set_busy(held, used)
      book.touched.clear()
    evictable.settle()

  @property
  def reclaimable(self) -> int:
    """Device pages that could be freed now.

    Those that swapped sequences use must fit in the host pool.
    """
    self._settle()
    return self._evictable.available(self._kept.num_free_host)

  @property
  def num_idle(self) -> int:
    """Device pages that only the host uses."""
    self._settle()
    return len(self._kept.by_page) - self._evictable.num_busy

  @property
  def host_room(self) -> int:
    """Host pages that are free, or could be freed by dropping spilled prefixes."""
    self._settle()
    return self._kept.num_free_host + self._evictable.num_droppable

  def stranded(self) -> list[Held]:
    """Device pages that only swapped sequences use."""
    self._settle()
    return list(self._evictable.stranded)

  def audit(self, kept: Iterable[Held]) -> int:
    """How many held pages are counted wrongly."""
    self._settle()
    book = self._book
    pages = [page for page in self._kept.by_page if book.refcount[page] > book.holds[page]]
    return self._evictable.audit(kept, {self._kept.by_page[page] for page in pages})

  @contextlib.contextmanager
  def guarding(self, held: Iterable[Held]) -> Iterator[None]:
    """Inside this context these pages stay where they are."""
    held = list(held)
    self._evictable.guard(held)
    try:
      yield
    finally:
      self._evictable.guard(held, -1)

  # Room on the device

  @property
  def available(self) -> int:
    """Device pages that are free, or could be freed by eviction."""
    return self._book.num_free + self.reclaimable

  def make_room(self, needed: int, spare: int = 0) -> None:
    """Evicts until `needed` pages are free; if it must evict, until `spare` pages more are free.

    Raises:
      OutOfPages: Too few pages are available.
    """
    if needed <= self._book.num_free:
      return
    available = self.available
    self.reclaim(needed + spare)
    if needed > self._book.num_free:
      raise errors.OutOfPages(needed, available, self._kept.name)

  def reclaim(self, target: int) -> None:
    """Frees pages that only the host uses, until `target` pages are free or none can be freed.

    # first    pages that only swapped sequences use          ──▶ host memory
    # then     pages of the index, in the policy's order      ──▶ free, or host memory
    """
    self._forget_buried()
    while (short := target - self._book.num_free) > 0:
      batch = self.stranded()[: min(short, self.host_room)] or self._victims(short)
      # An empty batch is not always the end: the index may have left pages to swapped sequences,
      # and host pages for them to move to.
      if not batch and not (self._evictable.stranded and self.host_room):
        return
      moving = [each for each in batch if each.kept]
      self._evicted([each for each in batch if not each.kept])  # first: this may free host pages
      self.to_host(moving)
      if spilled := sum(each.indexed > 0 for each in moving):
        self._event("spilled", spilled)

  def _victims(self, count: int) -> list[Held]:
    """About `count` pages of the index that leave the device next.

    # spill, and room          [a][b]  the node keeps b        b is in the batch, to be moved
    # no spill, or no room     [a][b]  the node forgets b      b is in the batch, to be dropped
    #   b swapped, and room    [a][b]  the node forgets b      b is in the batch, to be moved
    #   b swapped, no room     [a][b]  the node forgets b      b stays, for its sequence alone

    Returns:
      The pages to drop, and those to move to host memory, which are still kept.
    """
    batch: list[Held] = []
    room = self.host_room
    found = 0  # device pages in the batch
    with contextlib.ExitStack() as leaving:
      leaving.push(lambda raised, *_: self._abandon(batch) if raised else None)
      while found < count and (node := self._evictable.next_leaf()) is not None:
        pages = self._evictable.leaving(node, count - found)
        if self._options.spill and room > 0:
          gone = pages[:room]
          room -= len(gone)
          leaving.enter_context(self.guarding(gone))  # so that they are not chosen again
        else:
          gone = self._prefixes.forget_last(node, len(pages))
          moving = [each for each in pages if each.swapped and not each.indexed][:room]
          room -= len(moving)
          gone += moving
        found += sum(each.page is not None for each in gone)
        batch += gone
    return batch

  def _abandon(self, batch: list[Held]) -> None:
    """Drops what the index gave up before the policy raised."""
    self._evicted([each for each in batch if not each.kept])

  def _evicted(self, held: list[Held]) -> None:
    """Drops pages that the prefix index gave up: those on the device become free."""
    self._kept.drop(self.given_up(held))

  def given_up(self, held: list[Held]) -> list[int]:
    """Forgets pages that the prefix index gave up; returns the device pages to drop."""
    pages = self._kept.forget(dict.fromkeys(held))
    if held:
      self._kept.count["evicted_pages"] += len(pages)
      self._event("evicted", len(held))
    return pages

  # Room in host memory

  def to_host(self, held: list[Held]) -> None:
    """Moves device pages to host memory; drops spilled prefixes if the host pool is full.

    # held       device page ──▶ image
    # spilled    image       ──▶ gone, from the ends of branches
    """
    if held:
      self._forget_buried()
      with self.guarding(held):
        short = len(held) - self._kept.num_free_host
        released: list[Held] = []
        while len(released) < short and (node := self._evictable.next_spilled()) is not None:
          released += self._prefixes.forget_from(node, len(node.held) - 1)
        self._kept.let_go(released)
      self._kept.to_host(held)

  # Stored prefixes

  def evict_entry(self) -> list[Held] | None:
    """Removes the stored prefix that goes first.

    Returns:
      The pages that nothing uses now; None if all stored prefixes are in use or pinned.
    """
    self._settle()
    node = self._evictable.next_entry()
    return None if node is None else self._prefixes.retire(node)

  def evict_entries(self, count: int) -> int:
    """Removes up to `count` stored prefixes that no sequence uses; returns how many."""
    done = 0
    while done < count and (released := self.evict_entry()) is not None:
      self._evicted(released)
      done += 1
    return done

  def expire(self) -> None:
    """Forgets the prefixes whose lifetime is over."""
    self._evicted(self._prefixes.expire())

  def _forget_buried(self) -> None:
    """Frees the pages of prefixes that expired in a lookup, or that another group gave up."""
    if self._prefixes.buried:
      self.expire()

  def tidy(self) -> None:
    """Frees the pages of prefixes that are gone, and counts what has changed."""
    self._forget_buried()
    self._settle()

  def unpinned(self) -> list[Held]:
    """Removes every stored prefix that is not pinned, those in use too.

    Returns:
      The pages that nothing uses now.
    """
    released: list[Held] = []
    for node in reversed(list(self._prefixes.nodes())):  # children first
      if node.attached and not (node.entry is not None and node.entry.pinned):
        released += self._prefixes.retire(node)
    return list(dict.fromkeys(each for each in released if not each.kept))
