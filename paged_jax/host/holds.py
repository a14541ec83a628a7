"""A held page: a page that the host keeps, on the device or in host memory.

    # prefix index  ──┐
    #                 ├──▶ Held (page 7)        one `hold` in the ledger
    # swapped A     ──┤
    # swapped B     ──┴──▶ Held (an image)      one page of the host pool

All users of a held page share one object. So the page moves once, and all users find it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from paged_jax.types import Pages


@dataclasses.dataclass(eq=False, slots=True)
class Held:
  """One held page. While it has a user, exactly one of `page` and `image` is set."""

  page: int | None = None  # its device page
  image: Pages | None = None  # its bytes in host memory, [L,H,T,2D]
  # Users:
  nodes: list[Any] = dataclasses.field(default_factory=list, repr=False)  # of the prefix index
  swapped: int = 0  # swapped sequences
  # Written by `reclaim` only:
  busy: bool = False  # a row uses the page too
  guards: int = 0  # changes under way that need the page where it is
  blocked: int = 0  # nodes in which this page, or one after it, is busy, guarded or pinned
  covered: int = 0  # nodes in which a page after this one is on the device
  kind: int = 0  # see `reclaim`

  @property
  def indexed(self) -> int:
    """How many nodes of the prefix index use it."""
    return len(self.nodes)

  @property
  def kept(self) -> bool:
    """Whether anything on the host uses it."""
    return bool(self.nodes) or self.swapped > 0


def latest_start(length: int, window: int | None, otherwise: int = 0) -> int:
  """The last start of a row of `length` tokens that has all that its next token sees.

  `otherwise` is the answer without a window.
  """
  return otherwise if window is None else max(0, length + 1 - window)


def pages_of(held: Iterable[Held]) -> list[int]:
  """The device pages of those held pages that are on the device."""
  return [each.page for each in held if each.page is not None]
