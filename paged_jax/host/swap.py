"""Swap: sequences move to host memory and back."""

from collections.abc import Sequence

import numpy as np

from paged_jax.host import errors
from paged_jax.host.admission import Admission
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Handle, Sequences


class Swap:
  """Bodies of swap_out and swap_in. Not thread-safe.

  Args:
    sequences: The live sequences.
    reclaim: Makes room by eviction.
    admission: Frees rows, and starts rows on held pages.
  """

  def __init__(self, sequences: Sequences, reclaim: Reclaim, admission: Admission):
    self._sequences, self._reclaim, self._admission = sequences, reclaim, admission
    self._turn = sequences.turn
    self._kept, self._ledger = self._turn.kept, self._turn.state.ledger

  def out(self, handles: Sequence[Handle]) -> None:
    """Moves sequences to host memory, all or none.

    #             device pages                 host memory
    # before      row A [a][b]   row B [a][c]
    # A is out    held  [a]      row B [a][c]  b                a stays: B's row uses it
    # B is out                                 a b c            a moves once, for both
    """
    self._check_enabled()
    rows = [self._sequences.running(handle) for handle in handles]
    self._sequences.distinct(handles)
    self._check_host_room(rows)
    for handle, row in zip(handles, rows):
      handle.start, handle.length = self._sequences.bounds(row)
      handle.held, fresh = self._kept.at(self._sequences.mapped(row))
      self._turn.state.apply_ids("hold", fresh)
      for each in handle.held:
        self._kept.swap(each, 1)
      handle.place, handle.tokens = None, self._sequences.known(row).copy()
    self._admission.free(rows)
    moved = dict.fromkeys(each for handle in handles for each in handle.held)
    self._reclaim.to_host([each for each in self._reclaim.stranded() if each in moved])
    for handle in handles:
      self._turn.event("swapped_out", handle.request_id, len(handle.held), handle.length)

  def _check_enabled(self) -> None:
    """Raises if swapping is off."""
    if not self._turn.options.swapping:
      raise errors.Disabled("swapping")

  def _check_host_room(self, rows: list[int]) -> None:
    """Raises unless the host pool has room for the pages that would move.

    These are the pages that only these rows and swapped sequences use.
    """
    pages, entries = np.unique(
      [page for row in rows for page in self._sequences.mapped(row)], return_counts=True
    )
    moving = 0
    for page, count in zip(pages.tolist(), entries.tolist()):
      held = self._kept.by_page.get(page)
      others = int(self._ledger.groups[0].refcount[page]) - count - (held is not None)
      moving += others == 0 and (held is None or not held.indexed)
    if moving > self._kept.num_free_host and moving > self._reclaim.host_room:
      raise errors.OutOfHostPages(needed=moving, free=self._reclaim.host_room)

  def back(self, handles: Sequence[Handle]) -> None:
    """Brings sequences back into rows, all or none.

    # to_device   images ──▶ new pages, which the host holds
    # adopt       the rows hold these pages too
    # let_go      the host gives up the pages that nothing else on the host uses
    """
    self._check_enabled()
    for handle in handles:
      if self._sequences.live(handle).place is not None:
        raise errors.NotSwappedOut(handle.request_id)
    if len(handles) > len(self._sequences.rows):
      raise errors.OutOfRows(needed=len(handles), free=len(self._sequences.rows))
    self._sequences.distinct(handles)
    held = dict.fromkeys(each for handle in handles for each in handle.held)
    away = [each for each in held if each.page is None]
    with self._reclaim.guarding(held):
      self._reclaim.make_room(len(away))
      self._kept.to_device(away)
    starts = []
    for handle in handles:
      row = self._sequences.occupy(handle)
      starts.append((row, handle.held, handle.start, handle.length))
    self._admission.adopt(starts)
    for handle in handles:
      for each in handle.held:
        self._kept.swap(each, -1)
      self._kept.let_go(dict.fromkeys(handle.held))
      self._turn.event("swapped_in", handle.request_id, len(handle.held), handle.length)
      handle.held = []
    if not self._turn.config.copy_on_write:  # `adopt` rounded up to whole pages: cut again
      lengths = self._ledger.lengths.copy()
      for row, _, _, length in starts:
        lengths[row] = length
      self._kept.apply("trim", lengths)
