"""The manager's numbers, each defined once."""

from typing import NamedTuple

from paged_jax.types import Audit


class SequenceStats(NamedTuple):
  """One sequence's numbers."""

  num_tokens: int
  num_pages: int  # on the device, shared ones included
  num_host_pages: int
  num_bytes: int  # of all its pages
  utilization: float  # tokens / (pages * page size)
  last_access: float  # seconds, of the manager's clock


class PrefixStats(NamedTuple):
  """The prefix cache's numbers. A hit is a lookup that found at least one token."""

  queries: int
  hits: int
  misses: int
  tokens_queried: int
  tokens_hit: int
  evictions: int  # pages that left the device
  entries: int
  cached_tokens: int

  @property
  def hit_rate(self) -> float:
    """Hits per query."""
    return self.hits / self.queries if self.queries else 0.0


class Stats(NamedTuple):
  """The manager's numbers, exact at the time of the call."""

  num_pages: int
  free_pages: int
  used_pages: int
  peak_pages: int
  reclaimable_pages: int  # kept for prefixes or swapped sequences only
  utilization: float  # used / all pages
  page_bytes: int
  num_host_pages: int
  free_host_pages: int
  peak_host_pages: int
  running: int  # sequences in a row
  swapped: int
  allocations: int
  deallocations: int
  refusals: int  # requests that got an error for want of pages, rows or host pages
  pages_taken: int
  pages_released: int
  copies: int  # pages copied on write
  pages_swapped_out: int  # moved to host memory, spilled ones included
  pages_swapped_in: int
  evicted_pages: int


class Collected(NamedTuple):
  """What `gc` did."""

  num_pages: int  # free now that were not
  num_bytes: int
  num_entries: int
  seconds: float


class AuditReport(NamedTuple):
  """Zero everywhere for a sound manager."""

  device: Audit  # laws 1 to 3 on the device
  twin: int  # leaves in which the twin differs from the device's ledger
  holds: int  # pages whose holds are not what the host keeps
  host_pages: int  # distance of the host pool's count from its images
  sequences: int  # sequences whose row or kept pages disagree with the ledger
  users: int  # kept pages whose count of users is off

  @property
  def clean(self) -> bool:
    """Whether everything agrees."""
    return not any(map(int, self.device)) and not any(self[1:])
