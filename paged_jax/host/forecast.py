"""Pages that programs and requests would take. Never waits for the reports of programs.

The numbers are those of the host's ledger: unreported programs are not counted yet.
"""

from collections.abc import Sequence

import numpy as np

from paged_jax import groups
from paged_jax.host.admission import Admission
from paged_jax.host.config import Request
from paged_jax.host.prefix import encoded
from paged_jax.host.prefixes import Prefixes
from paged_jax.host.sequences import Handle, Sequences
from paged_jax.ledger.book import Book


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
    """Pages of all groups that rows map; a shared page counts once for each row."""
    books = self._ledger.groups
    return sum(int(np.count_nonzero(book.block_tables < book.num_pages)) for book in books)

  def to_begin(self, tokens: Sequence[int] | np.ndarray, step: int | None) -> list[int]:
    """Most pages that a sequence of these tokens would take at once, beyond cached ones.

    It grows by `step` tokens at a time; None = by all at once.
    """
    request = Request(None, tokens=tokens)
    match = self._prefixes.match(request, encoded(tokens), touch=False)
    needed = self._admission.needed([request], [match])
    if step is None:
      return needed
    return [min(own, _most(book, step)) for own, book in zip(needed, self._ledger.groups)]

  def to_reach(self, lengths: np.ndarray, step: int | None) -> list[int]:
    """Most pages that rows would take at once, copies included, to grow to `lengths` i32[S] tokens.

    # window 8, pages of 4, step 4      from token 20 to 40, a row takes 5 pages, one after the other,
    # [e 16][f 20][g 24][h 28]          and gives up one for each: no more than 4 are there at once.
    #                                   It gives up those that it has alone now, so these count as there
    """
    if (lengths > self._ledger.capacity).any():
      raise ValueError(f"lengths must be at most {self._ledger.capacity}, got {lengths.max()}")
    more = np.maximum(lengths - self._ledger.lengths, 0)
    needed = groups.each(self._ledger.pages_needed(more))
    if step is not None:
      needed = [
        own if book.window is None else np.minimum(own, _missing(book, step))
        for own, book in zip(needed, self._ledger.groups)
      ]
    return [int(own.sum()) for own in needed]

  def to_search(self, handles: Sequence[Handle], length: int, shared: int) -> list[int]:
    """Most pages that a beam search would take; see `Manager.pages_to_search`.

    # shared     [a][b]            each row maps these; they stay as they are
    # row 0            [c][d]      d is row 0's alone: it counts as there already
    # row 1            [c][e]      c is held by these rows only: it counts so too
    # at worst         [.][.]      for each row, up to `length` tokens
    """
    rows = [self._sequences.place(handle) for handle in handles]
    needed = []
    for book in self._ledger.groups:
      size = book.page_size
      alone = book.num_alone(book.block_tables[rows, shared // size :])
      each = min(-(-length // size) - shared // size, _most(book, 1))
      needed.append(max(0, len(rows) * each - (alone if book.window is None else 0)))
    return needed


def _missing(book: Book, step: int) -> np.ndarray:
  """Pages i32[S] that each row has alone, fewer than the most that it has at once."""
  tables = book.block_tables
  mapped = tables < book.num_pages
  alone = mapped & (book.refcount[np.where(mapped, tables, 0)] == 1)
  return np.maximum(_most(book, step) - alone.sum(axis=1), 0)


def _most(book: Book, step: int) -> int:
  """Most pages that a row takes and has at once, if it grows by at most `step` tokens at a time."""
  if book.window is None:
    return book.pages_per_row + 1  # the copy of a tail
  return -(-(book.window - 2 + step) // book.page_size) + 1  # of window - 1 + step tokens
