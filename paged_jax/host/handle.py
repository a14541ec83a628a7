"""A caller's grip on one sequence."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from paged_jax.host.stats import SequenceStats

if TYPE_CHECKING:
  from paged_jax.host.manager import Manager


class Handle:
  """A caller's grip on one sequence. After `deallocate` every use of it is refused."""

  __slots__ = ("cache_id", "last_logits", "manager", "num_cached", "request_id")

  def __init__(self, manager: "Manager", request_id: Hashable, cache_id: int):
    self.manager, self.request_id, self.cache_id = manager, request_id, cache_id
    self.num_cached = 0  # tokens that the prefix cache gave
    self.last_logits: Any = None  # on a full hit

  def __repr__(self) -> str:
    return f"Handle({self.request_id!r}, cache_id={self.cache_id})"

  @property
  def is_valid(self) -> bool:
    """Whether the sequence is live."""
    return self.manager.is_valid(self)

  @property
  def num_tokens(self) -> int:
    """Tokens held."""
    return self.manager.sequence_stats(self).num_tokens

  @property
  def row(self) -> int:
    """Its row of the cache, for plans of one's own."""
    return self.manager.row(self)

  @property
  def pages(self) -> list[int]:
    """Physical pages in logical order."""
    return self.manager.pages(self)

  @property
  def is_shared(self) -> bool:
    """Whether any of its pages has another holder."""
    return self.manager.is_shared(self)

  @property
  def is_swapped(self) -> bool:
    """Whether it is in host memory."""
    return self.manager.is_swapped(self)

  def page_at(self, logical_page: int) -> int:
    """Physical page of a logical one.

    Raises:
      UnmappedToken: There is no such page.
    """
    return self.manager.page_at(self, logical_page)

  @property
  def block_table(self) -> np.ndarray:
    """i32[P] its row of the block tables; the number of pages where it has none."""
    return self.manager.block_table(self)

  @property
  def device(self):
    """Where its pages are; the first device of several."""
    return self.manager.device(self)

  @property
  def page_size(self) -> int:
    """Tokens per page."""
    return self.manager.config_of(self).page_size

  @property
  def num_layers(self) -> int:
    """Layers of a page."""
    return self.manager.config_of(self).num_layers

  @property
  def num_kv_heads(self) -> int:
    """KV heads of a layer."""
    return self.manager.config_of(self).num_kv_heads

  @property
  def head_dim(self) -> int:
    """Width of a key, and of a value."""
    return self.manager.config_of(self).head_dim

  def required_pages(self, num_tokens: int) -> int:
    """Pages that so many tokens fill."""
    return -(-num_tokens // self.page_size)

  def stats(self) -> SequenceStats:
    """This sequence's numbers."""
    return self.manager.sequence_stats(self)

  def clone(self, request_id: Hashable) -> "Handle":
    """A sequence of its own that shares all pages; nothing is copied until one of them writes."""
    return self.manager.clone(self, request_id)
