"""The pages that the host keeps: where each one is, and how it moves.

# free ◀── drop ── kept on the device ── to_host ──▶ kept in host memory
#                       ▲                                  │
#                       └──────────── to_device ───────────┘
"""

from collections.abc import Callable, Iterable

from paged_jax.host.config import ManagerConfig
from paged_jax.host.errors import OutOfHostPages
from paged_jax.host.holds import Held, pages_of
from paged_jax.host.state import ID_SIZES, State, batches


class Kept:
  """Every page that the host keeps, the host pool, and the counts of what moved.

  Args:
    state: The cache and its ledger.
    options: The manager's.
  """

  def __init__(self, state: State, options: ManagerConfig):
    self.state = state
    self.by_page: dict[int, Held] = {}  # those on the device
    self.changed: Callable[[Held], None] = lambda held: None  # called when one moved, came or went
    self.num_host_pages = options.num_host_pages
    self.num_used = 0  # host pages
    self.peak_used = 0
    self.count = dict.fromkeys(
      ("pages_taken", "pages_released", "pages_swapped_out", "pages_swapped_in", "evicted_pages"), 0
    )
    self.peak = 0  # most device pages in use at once
    self._scrub = options.scrub

  @property
  def num_free_host(self) -> int:
    """Host pages that nothing occupies."""
    return self.num_host_pages - self.num_used

  # Verbs, counted

  def apply(self, verb: str, *operands) -> None:
    """One verb; it must be granted."""
    self.state.apply(verb, *operands)
    self.count_pages()

  def count_pages(self) -> None:
    """Pages taken and released since the last time, and the peak."""
    used = self.state.config.num_pages - self.state.num_free
    change = used - (self.count["pages_taken"] - self.count["pages_released"])
    self.count["pages_taken" if change > 0 else "pages_released"] += abs(change)
    self.peak = max(self.peak, used)

  def drop(self, pages: list[int]) -> None:
    """The host gives up its holds on these device pages."""
    if pages:
      self.state.apply_ids("drop", pages)
      self.count_pages()
      self.scrub(pages)

  def scrub(self, pages: list[int]) -> None:
    """Clears those of `pages` that became free, if the manager is to do so."""
    if self._scrub:
      for _, ids in batches(pages, self.state.config.num_pages, ID_SIZES):
        self.state.cache = self.state.verbs.scrub(self.state.cache, ids)

  # Who keeps what

  def at(self, pages: Iterable[int]) -> tuple[list[Held], list[int]]:
    """What is kept on these device pages, and which of them the ledger must hold for that."""
    found, fresh = [], []
    for page in pages:
      held = self.by_page.get(page)
      if held is None:
        held = self.by_page[page] = Held(page)
        self.state.ledger.touched.add(page)
        fresh.append(page)
      found.append(held)
    return found, fresh

  def swap(self, held: Held, change: int) -> None:
    """One swapped sequence more, or less, needs a page."""
    held.swapped += change
    self.changed(held)

  def forget(self, held: Iterable[Held]) -> list[int]:
    """Forgets those that nobody needs; returns the device pages to drop."""
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
    """Forgets those that nobody needs, and drops their pages."""
    self.drop(self.forget(held))

  # Bytes

  def to_host(self, held: list[Held]) -> None:
    """The bytes of device pages go to host memory, and the pages become free.

    Raises:
      OutOfHostPages: The host pool has no room; nothing moved.
    """
    if len(held) > self.num_free_host:
      raise OutOfHostPages(needed=len(held), free=self.num_free_host)
    pages = pages_of(held)
    images = self.state.offload(pages)
    self.num_used += len(held)
    self.peak_used = max(self.peak_used, self.num_used)
    for page, each, image in zip(pages, held, images):
      del self.by_page[page]
      each.page, each.image = None, image
      self.changed(each)
    self.drop(pages)
    self.count["pages_swapped_out"] += len(held)

  def to_device(self, held: list[Held]) -> None:
    """The bytes of images go to fresh pages, for which there must be room."""
    if held:
      pages = self.state.restore([each.image for each in held if each.image is not None])
      for each, page in zip(held, pages):
        each.page, each.image = page, None
        self.by_page[page] = each
        self.changed(each)
      self.num_used -= len(held)
      self.count["pages_swapped_in"] += len(held)
      self.count_pages()
