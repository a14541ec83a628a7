"""The manager's numbers, each defined once, and the audit."""

from typing import NamedTuple

import jax
import numpy as np

from paged_jax.host.admission import Admission
from paged_jax.host.holds import Held
from paged_jax.host.prefix import PrefixIndex
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Sequences
from paged_jax.types import Audit


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
  copies: int  # pages copied on write, by verbs and by programs
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
  twin: int  # leaves in which the host's ledger differs from the device's
  holds: int  # pages whose holds are not what the host keeps
  host_pages: int  # distance of the host pool's count from its images
  sequences: int  # sequences whose row or kept pages disagree with the ledger
  users: int  # kept pages whose users, or whose place among the evictable ones, are wrong

  @property
  def clean(self) -> bool:
    """Whether everything agrees."""
    return not any(map(int, self.device)) and not any(self[1:])


def stats(sequences: Sequences, admission: Admission, reclaim: Reclaim) -> Stats:
  """Exact numbers, as of now."""
  kept, state = sequences.turn.kept, sequences.turn.state
  total, free = state.config.num_pages, state.num_free
  running = sum(each.place is not None for each in sequences.by_id.values())
  return Stats(
    num_pages=total,
    free_pages=free,
    used_pages=total - free,
    peak_pages=kept.peak,
    reclaimable_pages=reclaim.reclaimable,
    utilization=(total - free) / total,
    page_bytes=state.config.page_bytes,
    num_host_pages=kept.num_host_pages,
    free_host_pages=kept.num_free_host,
    peak_host_pages=kept.peak_used,
    running=running,
    swapped=len(sequences.by_id) - running,
    allocations=admission.num_allocations,
    deallocations=admission.num_deallocations,
    refusals=sequences.turn.num_refusals,
    copies=state.ledger.num_copies,
    **kept.count,
  )


def audit(sequences: Sequences, index: PrefixIndex, reclaim: Reclaim) -> AuditReport:
  """Reconciles both ledgers, what the host keeps, and the host pool. Reads the device."""
  kept, state = sequences.turn.kept, sequences.turn.state
  ledger = state.ledger
  leaves = zip(jax.tree.leaves(state.cache.ledger), jax.tree.leaves(ledger.snapshot()))
  held = np.zeros(ledger.num_pages, np.int32)
  held[list(kept.by_page)] = 1
  indexed = _counted(each for node in index.nodes() for each in node.held)
  swapped = _counted(each for handle in sequences.by_id.values() for each in handle.held)
  everything = {*indexed, *swapped, *kept.by_page.values()}
  return AuditReport(
    device=Audit(*jax.tree.map(int, state.verbs.audit(state.cache))),
    twin=sum(not np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves),
    holds=int((held != ledger.holds).sum()),
    host_pages=abs(sum(x.image is not None for x in everything) - kept.num_used),
    sequences=sequences.audit(np.flatnonzero(ledger.lengths).tolist()),
    users=sum(x.indexed != indexed.get(x, 0) or x.swapped != swapped.get(x, 0) for x in everything)
    + reclaim.audit(everything),
  )


def _counted(held) -> dict[Held, int]:
  count: dict[Held, int] = {}
  for each in held:
    count[each] = count.get(each, 0) + 1
  return count
