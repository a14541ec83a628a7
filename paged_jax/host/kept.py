"""Where pages are that the host keeps, and how room is made for more.

# free ◀── drop ── kept on the device ── offload ──▶ kept in host memory
#                       ▲                                  │
#                       └───────────── restore ────────────┘
"""

import contextlib
import itertools
from collections.abc import Callable

import numpy as np

from paged_jax.host import errors
from paged_jax.host.config import ManagerConfig
from paged_jax.host.holds import Held, Holds, pages_of
from paged_jax.host.prefix import Node, PrefixIndex
from paged_jax.host.state import ID_SIZES, State, batches


class Residency:
  """The cache with its twin, the pages that the host keeps, and their counts.

  Args:
    state: The cache and its twin.
    options: The manager's.
    prefixes: The prefix index.
    event: Called with a kind and a number of pages when pages leave.
  """

  def __init__(
    self,
    state: State,
    options: ManagerConfig,
    prefixes: PrefixIndex,
    event: Callable[[str, int], None],
  ):
    self.state, self.prefixes = state, prefixes
    self.holds = Holds(options.num_host_pages)
    self.count = dict.fromkeys(
      ("pages_taken", "pages_released", "pages_swapped_out", "pages_swapped_in", "evicted_pages"), 0
    )
    self.peak = 0  # most pages in use at once
    self._config, self._options, self._event = state.config, options, event

  def apply(self, verb: str, *operands: np.ndarray) -> None:
    """One verb, counted."""
    self.state.apply(verb, *operands)
    self.count_pages()

  def count_pages(self) -> None:
    """Pages taken and released since the last time, and the peak."""
    used = self._config.num_pages - self.state.num_free
    change = used - (self.count["pages_taken"] - self.count["pages_released"])
    self.count["pages_taken" if change > 0 else "pages_released"] += abs(change)
    self.peak = max(self.peak, used)

  def let_go(self, pages: list[int]) -> None:
    """The host holds these pages no more."""
    if pages:
      self.state.apply_ids("drop", pages)
      self.count_pages()
      self.scrub(pages)

  def scrub(self, pages: list[int]) -> None:
    """Clears those of `pages` that became free, if the manager is to do so."""
    if self._options.scrub:
      for _, ids in batches(pages, self._config.num_pages, ID_SIZES):
        self.state.cache = self.state.verbs.scrub(self.state.cache, ids)

  def busy(self, held: Held) -> bool:
    """Whether a row uses a kept page."""
    state = self.state  # a hold that is noted, and not yet applied, makes no difference
    return held.page is not None and bool(state.refcount[held.page] > state.holds[held.page])

  def stranded(self, held: Held) -> bool:
    """Whether only swapped sequences need a device page."""
    return held.page is not None and not held.indexed and held.swapped > 0 and not self.busy(held)

  def host_room(self, guard: set[Held], ready: Callable[[Held], bool] = lambda held: False) -> int:
    """Host pages that are free, or taken by prefixes that may go, once what is `ready` went."""
    if not self.holds.num_used:  # nothing is there that might go
      return self.holds.num_free
    return self.holds.num_free + len(self.prefixes.spilled(guard, ready))

  def to_host(self, held: list[Held], guard: set[Held]) -> None:
    """The bytes of kept device pages go to host memory, and the pages become free.

    Spilled prefixes outside `guard` make room there.
    """
    if held:
      short = len(held) - self.holds.num_free
      if short > 0:
        self.drop(self.prefixes.forget_spilled(short, guard))
      images = self.state.offload(pages_of(held))
      pages = self.holds.to_host(held, images)
      self.let_go(pages)
      self.count["pages_swapped_out"] += len(held)

  def to_device(self, held: list[Held]) -> None:
    """The bytes of kept images go to fresh pages, for which there must be room."""
    if held:
      pages = self.state.restore([each.image for each in held if each.image is not None])
      self.holds.to_device(held, pages)
      self.count["pages_swapped_in"] += len(held)
      self.count_pages()
      self.prefixes.requeue_all(held)

  def drop(self, held: list[Held]) -> None:
    """Forgets kept pages that nobody needs any more."""
    self.let_go(self.holds.forget(held))

  def evicted(self, held: list[Held]) -> None:
    """Lets go of what the prefix index gave up."""
    self.let_go(self.given_up(held))

  def given_up(self, held: list[Held]) -> list[int]:
    """Forgets what the prefix index gave up; returns the pages to drop."""
    pages = self.holds.forget(dict.fromkeys(held))
    if held:
      self.count["evicted_pages"] += len(pages)
      self._event("evicted", len(held))
    return pages

  def reclaimable(self, guard: set[Held]) -> int:
    """Device pages that could become free now, without those in `guard`.

    Those that swapped sequences need, too, must fit in the host pool; no other page waits for them.
    """
    staying = self._staying(guard)
    stuck = self.prefixes.stuck(staying)
    swapped = [each for each in self.holds.by_page.values() if each.swapped]
    plain = len(self.holds.by_page) - len(swapped) - sum(not each.swapped for each in stuck)
    moving = sum(each.indexed > 0 and each not in stuck for each in swapped)
    moving += len(self._stranded(guard))
    return plain + min(moving, self.host_room(guard, lambda held: held not in staying))

  def _stranded(self, guard: set[Held]) -> list[Held]:
    held = (x for x in self.holds.by_page.values() if x.swapped)  # of very many, few or none
    return [x for x in held if self.stranded(x) and x not in guard]

  def _staying(self, guard: set[Held]) -> set[Held]:
    """Device pages that the prefix index cannot give up as long as no verb runs."""
    state, by_page = self.state, self.holds.by_page
    busy = np.flatnonzero((state.holds > 0) & (state.refcount > state.holds))
    used = {by_page[page] for page in busy.tolist() if page in by_page}
    return used | {each for each in guard if each.page is not None}

  def make_room(self, needed: int, guard: set[Held], spare: int = 0) -> None:
    """Sees to it that `needed` pages are free, or raises OutOfPages.

    What clearly cannot succeed evicts nothing; what evicts does so for `spare` more pages, too.
    """
    state = self.state
    if needed <= state.num_free:
      return
    idle = np.count_nonzero((state.holds == 1) & (state.refcount == 1))
    idle -= sum(each.page is not None and not self.busy(each) for each in guard)
    if needed <= state.num_free + idle:
      self.reclaim(needed + spare, guard)
    if needed > state.num_free:
      raise errors.OutOfPages(needed=needed, free=state.num_free + self.reclaimable(guard))

  def reclaim(self, target: int, guard: set[Held]) -> None:
    """Frees pages that only the host keeps until `target` are free, or none is left."""
    while (short := target - self.state.num_free) > 0:
      moving = self._stranded(guard)[: min(short, self.host_room(guard))]
      batch = moving or self._victims(short, guard)
      if not batch and not (self._stranded(guard) and self.host_room(guard)):
        return  # otherwise the index gave up what others need, and made room for it to move
      moving = [each for each in batch if each.kept]
      leaving = [each for each in batch if not each.kept] if moving else batch
      self.evicted(leaving)  # first: it may make room below
      self.to_host(moving, guard | set(moving))
      self.prefixes.requeue_all(moving)
      if moving:
        self._event("spilled", len(moving))

  def _victims(self, count: int, guard: set[Held]) -> list[Held]:
    """The next pages to leave the device; those still kept must move to the host."""
    batch: list[Held] = []
    room = self.host_room(guard)
    staying = self._staying(guard)  # or leaving
    found = 0  # pages of the batch that are on the device
    candidates = self.prefixes.candidates(lambda held: held not in staying)
    with contextlib.closing(candidates) as nodes:
      while found < count and (node := next(nodes, None)) is not None:
        if self._options.spill and room > 0:
          gone = _leaving(node, min(room, count - len(batch)), staying)
          room -= len(gone)
          staying.update(gone)
        else:
          pages = _leaving(node, count - found, staying)
          gone = self.prefixes.forget_last(node, len(pages))
          # Without room they stay, for the swapped sequences alone.
          moving = [each for each in pages if each.swapped and not each.indexed][:room]
          room -= len(moving)
          gone += moving
        found += sum(each.page is not None for each in gone)
        batch += gone
    return batch

  def expire(self) -> None:
    """Forgets the prefixes that have outlived their time."""
    self.evicted(self.prefixes.expire())

  def collect(self, target: int, guard: set[Held]) -> None:
    """Forgets what outlived its time, then evicts until `target` pages are free."""
    self.expire()
    self.reclaim(target, guard)


def _leaving(node: Node, count: int, staying: set[Held]) -> list[Held]:
  """Up to `count` pages off the tail of a node, all of which may leave."""
  pages = [each for each in reversed(node.held) if each.page is not None][:count]
  if staying.isdisjoint(pages):
    return pages
  return list(itertools.takewhile(lambda held: held not in staying, pages))
