"""What a user gives a manager: its options, and requests for sequences."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from paged_jax import groups
from paged_jax.config import CacheConfig
from paged_jax.host.eviction import LRU, Policy


def whole(name: str, value, least: int | None = None) -> int:
  """`value` as an int.

  Raises:
    ValueError: It is not an integer, or below `least`; the message has the name and the value.
  """
  whole_number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not whole_number or (least is not None and value < least):
    limit = "" if least is None else f" of at least {least}"
    raise ValueError(f"{name} must be an integer{limit}, got {value!r}")
  return int(value)


@dataclasses.dataclass(frozen=True)
class ManagerConfig:
  """Options of a manager.

  Raises:
    ValueError: A field is out of range; the message names the field and its value.

  >>> from paged_jax import host
  >>> host.ManagerConfig(num_host_pages=128, spill=True).max_prefixes
  100
  >>> host.ManagerConfig(high_watermark=2)
  Traceback (most recent call last):
  ...
  ValueError: high_watermark must be in [0, 1], got 2
  """

  num_host_pages: int | tuple[int, ...] = 512  # of each group's host pool
  swapping: bool = True  # whether sequences and prefixes may move to host memory
  low_watermark: float = 0.3  # fraction of pages; pressure is MEDIUM if fewer are free
  high_watermark: float = 0.1  # pressure is HIGH if fewer are free
  prefix_cache: bool = True  # whether prefixes may be stored
  max_prefixes: int = 100  # most stored prefixes
  min_prefix_length: int = 16  # fewest tokens of a stored prefix
  eviction: Policy = LRU  # the order in which prefixes leave
  spill: bool = False  # evicted prefix pages move to the host pool while it has room
  scrub: bool = False  # pages are cleared when they become free
  canary: bool = False  # one more layer marks which sequence wrote each slot; reads check the marks
  event_buffer: int = 4096  # events that are kept for readers

  def __post_init__(self):
    for name, least in dict(max_prefixes=0, min_prefix_length=1, event_buffer=1).items():
      object.__setattr__(self, name, whole(name, getattr(self, name), least))
    counts = [whole("num_host_pages", each, 0) for each in groups.each(self.num_host_pages)]
    object.__setattr__(self, "num_host_pages", groups.like(self.num_host_pages, counts))
    for name in ("low_watermark", "high_watermark"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    for name in ("swapping", "prefix_cache", "spill", "scrub", "canary"):
      if not isinstance(getattr(self, name), bool):
        raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
    if not isinstance(self.eviction, Policy):
      raise ValueError(f"eviction must be a Policy, got {self.eviction!r}")
    if self.high_watermark >= self.low_watermark:
      raise ValueError(
        f"high_watermark must be below low_watermark ({self.low_watermark}), "
        f"got {self.high_watermark}"
      )
    if any(counts) and not self.swapping:
      raise ValueError(f"num_host_pages must be 0 with swapping off, got {self.num_host_pages}")
    if self.spill and not self.swapping:
      raise ValueError("spill must be off with swapping off, got True")

  def check(self, caches: Sequence[CacheConfig]) -> None:
    """Raises ValueError unless the caches of all groups, and these options, go together."""
    for name in ("num_rows", "copy_on_write"):
      values = {getattr(cache, name) for cache in caches}
      if len(values) != 1:
        raise ValueError(f"caches must have the same {name}, got {sorted(values)}")
    sizes = {cache.page_size for cache in caches}
    if len(sizes) > 1 and not caches[0].copy_on_write:
      raise ValueError(f"without copy_on_write caches must have one page_size, got {sorted(sizes)}")
    pages = self.num_host_pages
    if groups.several(pages) and len(groups.each(pages)) != len(caches):
      raise ValueError(f"num_host_pages must be one number or {len(caches)}, got {pages}")

  def host_pages_of(self, group: int) -> int:
    """Pages of a group's host pool."""
    pages = self.num_host_pages
    return pages if isinstance(pages, int) else pages[group]


@dataclasses.dataclass(frozen=True)
class Request:
  """A request for a new sequence.

  A sequence starts on the longest cached prefix of its `tokens`.

  Raises:
    ValueError: A number is negative or not an integer, or an id cannot be hashed; the message names
      the field and its value.

  >>> from paged_jax import host
  >>> host.Request("a", 20).num_tokens, host.Request("b", tokens=[5, 6, 7]).num_tokens
  (20, 3)
  """

  request_id: Hashable
  initial_tokens: int | None = None  # tokens that the sequence has room for; None = those given
  tokens: Sequence[int] | np.ndarray | None = None  # ids of its first tokens, if known
  namespace: Hashable = None  # prefixes are found in the same one only; 1 and True are the same
  max_length: int | None = None  # most tokens, at most a row's capacity; None = that
  only_cached: bool = False  # it starts with cached tokens alone; `Manager.extend` makes room later
  # Checked against the pool of the first group, if given:
  num_layers: int | None = None
  num_kv_heads: int | None = None
  head_dim: int | None = None
  dtype: Any = None

  def __post_init__(self):
    for name in ("initial_tokens", "max_length", "num_layers", "num_kv_heads", "head_dim"):
      value = getattr(self, name)
      if value is not None:
        object.__setattr__(self, name, whole(name, value, 0))
    if not isinstance(self.only_cached, bool):
      raise ValueError(f"only_cached must be a bool, got {self.only_cached!r}")
    try:
      hash((self.request_id, self.namespace))
    except TypeError:
      raise ValueError(
        f"request_id and namespace must be hashable, got {self.request_id!r}, {self.namespace!r}"
      ) from None

  @property
  def num_tokens(self) -> int:
    """Tokens that the sequence starts with room for."""
    if self.initial_tokens is not None:
      return self.initial_tokens
    return 0 if self.tokens is None else len(self.tokens)
