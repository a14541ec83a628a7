"""What a program, or a request, would take. Never waits for the reports of programs.

The numbers are those of the last report taken over, with all that came after it except programs.
"""

from collections.abc import Sequence

import numpy as np

from paged_jax.host.admission import Admission
from paged_jax.host.config import Request
from paged_jax.host.prefix import encoded
from paged_jax.host.prefixes import Prefixes
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Handle, Sequences


class Forecast:
  """Counts of pages, for those who run programs on the manager's cache.

  Args:
    sequences: Who is live.
    reclaim: What could be freed.
    admission: What requests take.
    prefixes: What prompts may start on.
  """

  def __init__(
    self, sequences: Sequences, reclaim: Reclaim, admission: Admission, prefixes: Prefixes
  ):
    self._sequences, self._reclaim, self._admission = sequences, reclaim, admission
    self._prefixes, self._ledger = prefixes, sequences.ledger

  @property
  def num_mapped(self) -> int:
    """Pages that rows map, a shared one once for each row."""
    return int(np.count_nonzero(self._ledger.block_tables < self._ledger.num_pages))

  @property
  def num_idle(self) -> int:
    """Pages that only the host holds; eviction frees at most so many."""
    return self._reclaim.num_idle

  def to_begin(self, tokens: Sequence[int] | np.ndarray) -> int:
    """Pages that `allocate` would take for these tokens, besides those in the prefix cache."""
    request = Request(None, tokens=tokens)
    match = self._prefixes.match(request, encoded(tokens), touch=False)
    return self._admission.needed([request], [match])

  def to_reach(self, lengths: np.ndarray) -> int:
    """Pages that rows take, copies included, to grow to `lengths` i32[S] tokens, if they have fewer."""
    more = np.maximum(lengths - self._ledger.lengths, 0)
    return int(self._ledger.pages_needed(more).sum())

  def to_search(self, handles: Sequence[Handle], length: int, shared: int) -> int:
    """Most pages that sequences take to grow to `length` tokens each while they `reorder` among
    themselves, but keep sharing their first `shared` tokens."""
    ledger = self._ledger
    size = ledger.page_size
    rows = [self._sequences.place(handle) for handle in handles]
    pages = ledger.block_tables[rows, shared // size :]
    own, entries = np.unique(pages[pages < ledger.num_pages], return_counts=True)
    alone = int((ledger.refcount[own] == entries).sum())
    return max(0, len(rows) * (-(-length // size) - shared // size) - alone)
