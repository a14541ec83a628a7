"""The manager's numbers and its audit."""

from collections import Counter
from typing import NamedTuple

import jax
import numpy as np

from paged_jax.host.admission import Admission
from paged_jax.host.prefix import PrefixIndex
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Sequences
from paged_jax.types import Audit


class Stats(NamedTuple):
  """The manager's numbers, exact at the time of the call.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> stats = manager.stats()
  >>> stats.num_pages, stats.free_pages, stats.page_bytes
  (8, 8, 256)
  """

  num_pages: int
  free_pages: int
  used_pages: int
  peak_pages: int
  reclaimable_pages: int  # used by prefixes or swapped sequences only, and could be freed
  utilization: float  # used pages / all pages
  page_bytes: int
  num_host_pages: int
  free_host_pages: int
  peak_host_pages: int
  running: int  # sequences in a row
  swapped: int  # sequences in host memory
  allocations: int
  deallocations: int
  refusals: int  # calls that raised because pages, rows or host pages are missing
  pages_taken: int
  pages_released: int
  copies: int  # pages copied on write, by verbs and by programs
  pages_swapped_out: int  # moved to host memory, spilled ones included
  pages_swapped_in: int
  evicted_pages: int


class AuditReport(NamedTuple):
  """What does not agree, counted: a sound manager has zero everywhere.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> manager.audit().twin, manager.audit().clean
  (0, True)
  """

  device: Audit  # laws 1 to 3 on the device
  twin: int  # leaves in which the host's ledger differs from the device's
  holds: int  # pages for which the ledger has other holds than the host's list of held pages
  host_pages: int  # difference between the used host pages and the images in host memory
  sequences: int  # rows that are free and filled, or belong to two sequences or to none
  users: int  # held pages whose users, or whose counts for eviction, are wrong

  @property
  def clean(self) -> bool:
    """Whether all of them are zero."""
    return not any(map(int, self.device)) and not any(self[1:])


def stats(sequences: Sequences, admission: Admission, reclaim: Reclaim) -> Stats:
  """The manager's numbers now."""
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
  """Compares both ledgers, the held pages and the host pool. Reads the device."""
  kept, state = sequences.turn.kept, sequences.turn.state
  ledger = state.ledger
  leaves = zip(jax.tree.leaves(state.cache.ledger), jax.tree.leaves(ledger.snapshot()))
  held = np.zeros(ledger.groups[0].num_pages, np.int32)
  held[list(kept.by_page)] = 1
  indexed = Counter(each for node in index.nodes() for each in node.held)
  swapped = Counter(each for handle in sequences.by_id.values() for each in handle.held)
  everything = {*indexed, *swapped, *kept.by_page.values()}
  return AuditReport(
    device=Audit(*jax.tree.map(int, state.verbs.audit(state.cache))),
    twin=sum(not np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves),
    holds=int((held != ledger.groups[0].holds).sum()),
    host_pages=abs(sum(x.image is not None for x in everything) - kept.num_used),
    sequences=sequences.audit(np.flatnonzero(ledger.lengths).tolist()),
    users=sum(x.indexed != indexed[x] or x.swapped != swapped[x] for x in everything)
    + reclaim.audit(everything),
  )
