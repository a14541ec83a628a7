"""Sequences on the same pages: shares, clones, and the copies that end sharing."""

from typing import Any

import numpy as np

from paged_jax.host import errors
from paged_jax.host.admission import Admission
from paged_jax.host.config import Request
from paged_jax.host.pools import Pools
from paged_jax.host.sequences import Clones, Handle, Sequences
from paged_jax.ledger.book import Book


class Sharing:
  """Bodies of share_prefix, clone and cow_copy. Not thread-safe.

  Args:
    sequences: The live sequences.
    pools: Make room for copies.
    admission: Begins clones.
  """

  def __init__(self, sequences: Sequences, pools: Pools, admission: Admission):
    self._sequences, self._pools, self._admission = sequences, pools, admission
    self._turn, self._state = sequences.turn, sequences.turn.state
    self._ledger = self._state.ledger

  def share(self, source: Handle, target: Handle, num_tokens: int) -> None:
    """Puts the first tokens of `source` into the empty `target`, on the same pages.

    # source before   [a][b][c ]        refcounts 1 1 1
    # both after      [a][b][c ]        refcounts 2 2 2; the first that grows copies c
    """
    src, dst = self._sequences.running(source), self._sequences.running(target)
    if num_tokens > target.max_length:
      raise errors.TooLong(target.request_id, num_tokens, target.max_length)
    if self._ledger.lengths[dst]:
      raise errors.NotEmpty(target.request_id, int(self._ledger.lengths[dst]))
    self._check(source, src, num_tokens)
    rows = (
      (src, dst, num_tokens),
      (self._state.num_rows, self._state.num_rows, 0),
    )  # one, and padding
    self._turn.apply("fork", *np.array(rows, np.int32).T)
    self._sequences.know(dst, self._sequences.known(src, num_tokens))
    target.writers, target.marked_at = [x[:num_tokens] for x in source.writers], source.marked_at
    num_pages = sum(len(self._sequences.mapped(dst, group)) for group in self._sequences.groups)
    self._turn.event("forked", target.request_id, num_pages, num_tokens)

  def _check(self, source: Handle, row: int, num_tokens: int) -> None:
    """Raises unless the first `num_tokens` tokens of a row can be shared."""
    if not self._sequences.begins(row, num_tokens):
      raise self._sequences.unmapped(source, num_tokens)
    if num_tokens % self._state.page_size and not self._state.copy_on_write:
      raise errors.Disabled("copy-on-write")

  def clone(
    self, manager: Clones, source: Handle, request_id: object, num_tokens: int | None
  ) -> Handle:
    """Begins a sequence on the pages of `source`; see `share`."""
    row = self._sequences.running(source)
    request = Request(request_id, 0, namespace=source.namespace, max_length=source.max_length)
    self._admission.check([request])
    if not self._sequences.rows:
      raise errors.OutOfRows(needed=1, free=0)
    length = int(self._ledger.lengths[row]) if num_tokens is None else num_tokens
    self._check(source, row, length)
    copy = self._admission.begin(manager, request, self._pools.nothing)
    self.share(source, copy, length)
    return copy

  def own_pages(self, handle: Handle, first_page: int) -> Any:
    """Makes the row the only holder of its pages from number `first_page` on; returns its pages."""
    row = self._sequences.running(handle)
    if not self._state.copy_on_write:
      raise errors.Disabled("copy-on-write")
    self.own(handle, first_page * self._sequences.config.page_size)
    return self._state.like([self._sequences.mapped(row, x) for x in self._sequences.groups])

  def own(self, handle: Handle, start: int) -> None:
    """Makes the row the only holder of its pages from the one of token `start` on.

    # row before   [a][b][c]      others hold a and b too; start is on b
    # row after    [a][b'][c]     the row takes b', a copy of b, and gives up b
    """
    row = self._sequences.running(handle)
    length = int(self._ledger.lengths[row])
    if not 0 <= start < max(length, 1):
      raise self._sequences.unmapped(handle, start)
    shared = [_shared(book, row, start) for book in self._ledger.groups]
    if any(shared):
      if not self._state.copy_on_write:
        raise errors.Disabled("copy-on-write")
      self._pools.make_room(shared)
      starts = self._ledger.lengths.copy()
      starts[row] = start
      self._turn.apply("unshare", starts)


def _shared(book: Book, row: int, start: int) -> int:
  """Pages of a row from token `start` on that others hold too."""
  first = max(start, int(book.starts[row])) // book.page_size
  pages = book.block_tables[row, first : -(-int(book.lengths[row]) // book.page_size)]
  return int((book.refcount[pages] > 1).sum())
