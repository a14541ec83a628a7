"""Pages that the host keeps: each is one object, on the device or in host memory.

    # prefix index  ──┐
    #                 ├──▶ Held (page 7)        one `hold` in the ledger
    # swapped A     ──┤
    # swapped B     ──┴──▶ Held (an image)      one page of the host pool

However many keep a page, it moves once, and all of them find it where it is.
"""

import dataclasses
from collections.abc import Iterable

from paged_jax.host.errors import OutOfHostPages
from paged_jax.types import Pages


@dataclasses.dataclass(eq=False, slots=True)
class Held:
  """One page kept by the host. Exactly one of `page` and `image` is set while somebody keeps it."""

  page: int | None = None  # on the device
  image: Pages | None = None  # in host memory, [L,H,T,2D]
  indexed: int = 0  # how often the prefix index keeps it
  swapped: int = 0  # swapped sequences that keep it

  @property
  def kept(self) -> bool:
    """Whether anybody still needs it."""
    return self.indexed + self.swapped > 0


class Holds:
  """Every page that the host keeps, and how much host memory they take."""

  def __init__(self, num_host_pages: int):
    self.num_host_pages = num_host_pages
    self.num_used = 0  # host pages
    self.peak_used = 0
    self.by_page: dict[int, Held] = {}

  @property
  def num_free(self) -> int:
    """Host pages that nothing occupies."""
    return self.num_host_pages - self.num_used

  def at(self, pages: Iterable[int]) -> tuple[list[Held], list[int]]:
    """What is kept on these device pages, and which of them the ledger must hold for that."""
    found, fresh = [], []
    for page in pages:
      held = self.by_page.get(page)
      if held is None:
        held = self.by_page[page] = Held(page)
        fresh.append(page)
      found.append(held)
    return found, fresh

  def to_host(self, held: list[Held], images: Iterable[Pages]) -> list[int]:
    """Their bytes are in host memory from now on; returns the device pages to drop."""
    if len(held) > self.num_free:
      raise OutOfHostPages(needed=len(held), free=self.num_free)
    self.num_used += len(held)
    self.peak_used = max(self.peak_used, self.num_used)
    pages = pages_of(held)
    for page, each, image in zip(pages, held, images):
      del self.by_page[page]
      each.page, each.image = None, image
    return pages

  def to_device(self, held: list[Held], pages: Iterable[int]) -> None:
    """Their bytes are on these device pages from now on, which the ledger holds."""
    for each, page in zip(held, pages):
      each.page, each.image = page, None
      self.by_page[page] = each
    self.num_used -= len(held)

  def forget(self, held: Iterable[Held]) -> list[int]:
    """Forgets those that nobody keeps; returns the device pages to drop."""
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
    return pages


def pages_of(held: Iterable[Held]) -> list[int]:
  """The device pages of those that are on the device."""
  return [each.page for each in held if each.page is not None]
