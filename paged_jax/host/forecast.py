"""Pages that programs and requests would take. Never waits for the reports of programs.

The numbers are those of the host's ledger: unreported programs are not counted yet.
"""

from collections.abc import Sequence

import numpy as np

from paged_jax.host.admission import Admission
from paged_jax.host.config import Request
from paged_jax.host.prefix import encoded
from paged_jax.host.prefixes import Prefixes
from paged_jax.host.sequences import Handle, Sequences


class Forecast:
  """Counts of pages, for callers that run programs on the manager's cache. Not thread-safe.

  Args:
    sequences: The live sequences.
    admission: Counts the pages that requests take.
    prefixes: Finds the stored prefixes that prompts start on.
  """

  def __init__(self, sequences: Sequences, admission: Admission, prefixes: Prefixes):
    self._sequences, self._admission = sequences, admission
    self._prefixes, self._ledger = prefixes, sequences.ledger

  @property
  def num_mapped(self) -> int:
    """Pages that rows map; a shared page counts once for each row."""
    return int(
      np.count_nonzero(self._ledger.groups[0].block_tables < self._ledger.groups[0].num_pages)
    )

  def to_begin(self, tokens: Sequence[int] | np.ndarray) -> int:
    """Pages that `allocate` would take for these tokens, beyond those in the prefix cache."""
    request = Request(None, tokens=tokens)
    match = self._prefixes.match(request, encoded(tokens), touch=False)
    return self._admission.needed([request], [match])

  def to_reach(self, lengths: np.ndarray) -> int:
    """Pages that rows would take, copies included, to grow to `lengths` i32[S] tokens."""
    if (lengths > self._ledger.capacity).any():
      raise ValueError(f"lengths must be at most {self._ledger.capacity}, got {lengths.max()}")
    more = np.maximum(lengths - self._ledger.lengths, 0)
    return int(self._ledger.pages_needed(more).sum())

  def to_search(self, handles: Sequence[Handle], length: int, shared: int) -> int:
    """Most pages that a beam search would take; see `Manager.pages_to_search`.

    # shared     [a][b]            each row maps these; they stay as they are
    # row 0            [c][d]      d is row 0's alone: it counts as there already
    # row 1            [c][e]      c is held by these rows only: it counts so too
    # at worst         [.][.]      for each row, up to `length` tokens
    """
    ledger = self._ledger
    size = ledger.groups[0].page_size
    rows = [self._sequences.place(handle) for handle in handles]
    pages = ledger.groups[0].block_tables[rows, shared // size :]
    pages, entries = np.unique(pages[pages < ledger.groups[0].num_pages], return_counts=True)
    alone = int(
      (ledger.groups[0].refcount[pages] == entries).sum()
    )  # pages that no other holder has
    return max(0, len(rows) * (-(-length // size) - shared // size) - alone)
