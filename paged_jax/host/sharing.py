"""Sequences on the same pages: shares, clones, and the copies that end sharing."""

import numpy as np

from paged_jax.host import errors
from paged_jax.host.admission import Admission
from paged_jax.host.config import Request
from paged_jax.host.prefixes import NOTHING
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Clones, Handle, Sequences


class Sharing:
  """Bodies of share_prefix, clone and cow_copy. Not thread-safe.

  Args:
    sequences: The live sequences.
    reclaim: Makes room for copies.
    admission: Begins clones.
  """

  def __init__(self, sequences: Sequences, reclaim: Reclaim, admission: Admission):
    self._sequences, self._reclaim, self._admission = sequences, reclaim, admission
    self._turn = sequences.turn
    self._config, self._ledger = self._turn.config, self._turn.state.ledger

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
      (self._config.num_rows, self._config.num_rows, 0),
    )  # one, and padding
    self._turn.kept.apply("fork", *np.array(rows, np.int32).T)
    self._sequences.know(dst, self._sequences.known(src, num_tokens))
    target.writers, target.marked_at = source.writers[:num_tokens], source.marked_at
    num_pages = -(-num_tokens // self._config.page_size)
    self._turn.event("forked", target.request_id, num_pages, num_tokens)

  def _check(self, source: Handle, row: int, num_tokens: int) -> None:
    """Raises unless the first `num_tokens` tokens of a row can be shared."""
    begin, end = self._sequences.bounds(row)
    if not (begin <= num_tokens <= end or num_tokens == 0):
      raise self._sequences.unmapped(source, num_tokens)
    if num_tokens % self._config.page_size and not self._config.copy_on_write:
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
    copy = self._admission.begin(manager, request, NOTHING)
    self.share(source, copy, length)
    return copy

  def own_pages(self, handle: Handle, first_page: int) -> list[int]:
    """Makes the row the only holder of its pages from number `first_page` on; returns its pages."""
    row = self._sequences.running(handle)
    if not self._config.copy_on_write:
      raise errors.Disabled("copy-on-write")
    self.own(handle, first_page * self._config.page_size)
    return self._sequences.mapped(row)

  def own(self, handle: Handle, start: int) -> None:
    """Makes the row the only holder of its pages from the one of token `start` on.

    # row before   [a][b][c]      others hold a and b too; start is on b
    # row after    [a][b'][c]     the row takes b', a copy of b, and gives up b
    """
    row, size = self._sequences.running(handle), self._config.page_size
    first_token, length = self._sequences.bounds(row)
    if not 0 <= start < max(length, 1):
      raise self._sequences.unmapped(handle, start)
    pages = self._ledger.groups[0].block_tables[
      row, max(start, first_token) // size : -(-length // size)
    ]
    shared = int((self._ledger.groups[0].refcount[pages] > 1).sum())
    if shared:
      if not self._config.copy_on_write:
        raise errors.Disabled("copy-on-write")
      self._reclaim.make_room(shared)
      starts = self._ledger.lengths.copy()
      starts[row] = start
      self._turn.kept.apply("unshare", starts)
