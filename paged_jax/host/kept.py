"""The held pages: where each one is, and how it moves.

# free ◀── drop ── held on the device ── to_host ──▶ held in host memory
#                       ▲                                  │
#                       └──────────── to_device ───────────┘
"""

from collections.abc import Callable, Iterable

from paged_jax.host.config import ManagerConfig
from paged_jax.host.errors import OutOfHostPages
from paged_jax.host.holds import Held, pages_of
from paged_jax.host.state import State
from paged_jax.types import Pages


class Kept:
  """Every held page of a group, its host pool, and counts of pages that moved. Not thread-safe.

  Args:
    state: The caches and their ledger.
    group: Number of the group.
    options: The manager's.
  """

  def __init__(self, state: State, group: int, options: ManagerConfig):
    self.state, self.group = state, group
    self.config, self.book = state.configs[group], state.ledger.groups[group]
    self.by_page: dict[int, Held] = {}  # the held pages on the device
    self.changed: Callable[[Held], None] = lambda held: None  # called when one moved, came or went
    self.num_host_pages = options.host_pages_of(group)
    self.num_used = 0  # host pages in use
    self.peak_used = 0  # most host pages in use at once
    self.count = dict.fromkeys(
      ("pages_taken", "pages_released", "pages_swapped_out", "pages_swapped_in", "evicted_pages"), 0
    )
    self.peak = 0  # most device pages in use at once
    self._options = options

  @property
  def name(self) -> int | None:
    """The group's number for messages, None if it is the only one."""
    return self.group if len(self.state.configs) > 1 else None

  @property
  def num_free_host(self) -> int:
    """Host pages that are free."""
    return self.num_host_pages - self.num_used

  def count_pages(self) -> None:
    """Counts pages taken and released since the last call, and the peak."""
    used = self.config.num_pages - self.book.num_free
    change = used - (self.count["pages_taken"] - self.count["pages_released"])
    self.count["pages_taken" if change > 0 else "pages_released"] += abs(change)
    self.peak = max(self.peak, used)

  def hold(self, pages: list[int]) -> None:
    """Makes the host a holder of these device pages."""
    self.state.apply_ids("hold", self.group, pages)

  def drop(self, pages: list[int]) -> None:
    """Gives up the host's holds on these device pages.

    # page 7 before    row, host     refcount 2, holds 1
    #        after     row           refcount 1, holds 0; free if there is no row
    """
    if pages:
      self.state.apply_ids("drop", self.group, pages)
      self.count_pages()
      self.scrub(pages)

  def scrub(self, pages: list[int]) -> None:
    """In scrub mode, clears those of `pages` that are free."""
    if self._options.scrub:
      self.state.scrub(self.group, pages)

  # Users of held pages

  def at(self, pages: Iterable[int]) -> tuple[list[Held], list[int]]:
    """The held pages at these device pages; a page that is not held yet becomes one.

    # pages     7  8  9      the host holds 7 and 8 already
    # found     7  8  9      a `Held` for each
    # fresh           9      the caller applies `hold` to it

    Returns:
      The held pages, and the device pages that the ledger must `hold` for them.
    """
    found, fresh = [], []
    for page in pages:
      held = self.by_page.get(page)
      if held is None:
        held = self.by_page[page] = Held(page)
        self.book.touched.add(page)
        fresh.append(page)
      found.append(held)
    return found, fresh

  def swap(self, held: Held, change: int) -> None:
    """One swapped sequence more (`change` 1) or less (-1) uses a held page."""
    held.swapped += change
    self.changed(held)

  def forget(self, held: Iterable[Held]) -> list[int]:
    """Forgets those of these held pages that nothing uses.

    # on the device     by_page ──▶ returned, to be dropped
    # in host memory    host pool ──▶ gone

    Returns:
      The device pages to drop.
    """
    pages = []
    for each in held:
      if each.kept:
        continue
      if each.page is not None:
        pages.append(each.page)
        del self.by_page[each.page]
      elif each.image is not None:
        self.num_used -= 1
      each.page = each.image = None
      self.changed(each)
    return pages

  def let_go(self, held: Iterable[Held]) -> None:
    """Forgets those of these held pages that nothing uses, and drops their device pages."""
    self.drop(self.forget(held))

  # Bytes

  def bring(self, images: list[Pages], *, to_device: bool) -> list[Held]:
    """Held pages made of images that come from elsewhere; the caller gives them users.

    # image    ──▶ one host page more is used      there must be as many, or
    #          ──▶ page 3, held by the host        as many free device pages
    """
    held = [Held(image=image) for image in images]
    self.num_used += len(held)
    if to_device:
      self.to_device(held)
    self.peak_used = max(self.peak_used, self.num_used)
    return held

  def to_host(self, held: list[Held]) -> None:
    """Moves held pages to host memory; their device pages become free.

    # Held before    page 7, image -      the host is the only holder of page 7
    #      after     page -, image x      page 7 is free, one host page more is used

    Raises:
      OutOfHostPages: The host pool has no room; nothing moved.
    """
    if len(held) > self.num_free_host:
      raise OutOfHostPages(len(held), self.num_free_host, self.name)
    pages = pages_of(held)
    images = self.state.offload(self.group, pages)
    self.num_used += len(held)
    self.peak_used = max(self.peak_used, self.num_used)
    for page, each, image in zip(pages, held, images):
      del self.by_page[page]
      each.page, each.image = None, image
      self.changed(each)
    self.drop(pages)
    self.count["pages_swapped_out"] += len(held)

  def to_device(self, held: list[Held]) -> None:
    """Moves held pages back to the device, to new pages; enough pages must be free.

    # Held before    page -, image x
    #      after     page 3, image -      the host is the only holder of page 3
    """
    if held:
      pages = self.state.restore(
        self.group, [each.image for each in held if each.image is not None]
      )
      for each, page in zip(held, pages):
        each.page, each.image = page, None
        self.by_page[page] = each
        self.changed(each)
      self.num_used -= len(held)
      self.count["pages_swapped_in"] += len(held)
      self.count_pages()
