"""A page that the host keeps: one object, on the device or in host memory.

    # prefix index  ──┐
    #                 ├──▶ Held (page 7)        one `hold` in the ledger
    # swapped A     ──┤
    # swapped B     ──┴──▶ Held (an image)      one page of the host pool

Whatever number of users a page has, it moves once, and all of them find it where it is.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from paged_jax.types import Pages


@dataclasses.dataclass(eq=False, slots=True)
class Held:
  """One page kept by the host. Exactly one of `page` and `image` is set while anyone needs it."""

  page: int | None = None  # on the device
  image: Pages | None = None  # in host memory, [L,H,T,2D]
  nodes: list[Any] = dataclasses.field(
    default_factory=list, repr=False
  )  # that keep it in the index
  swapped: int = 0  # swapped sequences that keep it
  # Written by `reclaim` only:
  busy: bool = False  # a row uses it, too
  guards: int = 0  # reasons for which it must stay where it is
  blocked: int = 0  # nodes in which it, or a page after it, is busy or guarded
  covered: int = 0  # nodes in which a page after it is on the device
  kind: int = 0

  @property
  def indexed(self) -> int:
    """How often the prefix index keeps it."""
    return len(self.nodes)

  @property
  def kept(self) -> bool:
    """Whether anyone still needs it."""
    return bool(self.nodes) or self.swapped > 0


def pages_of(held: Iterable[Held]) -> list[int]:
  """The device pages of those that are on the device."""
  return [each.page for each in held if each.page is not None]
