"""Swap: sequences move to host memory and back."""

import itertools
from collections.abc import Sequence

import numpy as np

from paged_jax.host import errors
from paged_jax.host.admission import Admission
from paged_jax.host.holds import Held
from paged_jax.host.pools import Pools
from paged_jax.host.sequences import Handle, Sequences


class Swap:
  """Bodies of swap_out and swap_in. Not thread-safe.

  Args:
    sequences: The live sequences.
    pools: Make room by eviction.
    admission: Frees rows, and starts rows on held pages.
  """

  def __init__(self, sequences: Sequences, pools: Pools, admission: Admission):
    self._sequences, self._pools, self._admission = sequences, pools, admission
    self._turn = sequences.turn
    self._ledger = self._turn.state.ledger

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
    for group in self._sequences.groups:
      self._check_host_room(rows, group)
    for handle, row in zip(handles, rows):
      handle.starts, handle.length = self._sequences.starts(row), int(self._ledger.lengths[row])
      handle.held = tuple(self._take_out(row, group) for group in self._sequences.groups)
      handle.place, handle.tokens = None, self._sequences.known(row).copy()
    self._admission.free(rows)
    for group, reclaim in enumerate(self._pools.reclaims):
      moved = dict.fromkeys(each for handle in handles for each in handle.held[group])
      reclaim.to_host([each for each in reclaim.stranded() if each in moved])
    for handle in handles:
      self._turn.event("swapped_out", handle.request_id, _count(handle), handle.length)

  def _take_out(self, row: int, group: int) -> list[Held]:
    """The pages of a row in a group, held for a swapped sequence."""
    kept = self._pools.kept[group]
    held, fresh = kept.at(self._sequences.mapped(row, group))
    kept.hold(fresh)
    for each in held:
      kept.swap(each, 1)
    return held

  def _check_enabled(self) -> None:
    """Raises if swapping is off."""
    if not self._turn.options.swapping:
      raise errors.Disabled("swapping")

  def _check_host_room(self, rows: list[int], group: int) -> None:
    """Raises unless a group's host pool has room for the pages that would move.

    These are the pages that only these rows and swapped sequences use.
    """
    kept, reclaim = self._pools.kept[group], self._pools.reclaims[group]
    mapped = [page for row in rows for page in self._sequences.mapped(row, group)]
    pages, entries = np.unique(np.array(mapped, np.int64), return_counts=True)
    moving = 0
    for page, count in zip(pages.tolist(), entries.tolist()):
      held = kept.by_page.get(page)
      others = int(kept.book.refcount[page]) - count - (held is not None)
      moving += others == 0 and (held is None or not held.indexed)
    if moving > kept.num_free_host and moving > reclaim.host_room:
      raise errors.OutOfHostPages(moving, reclaim.host_room, kept.name)

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
    if not handles:
      return
    held = [dict.fromkeys(itertools.chain(*own)) for own in zip(*(x.held for x in handles))]
    with self._pools.guarding(held):
      self._pools.make_room([sum(each.page is None for each in own) for own in held])
      self._pools.to_device(held)
    starts = []
    for handle in handles:
      row = self._sequences.occupy(handle)
      starts.append((row, handle.held, handle.starts, handle.length))
    self._admission.adopt(starts)
    for handle in handles:
      self._pools.end_swap(handle.held)
      self._turn.event("swapped_in", handle.request_id, _count(handle), handle.length)
      handle.held = ()
    if not self._turn.state.copy_on_write:  # `adopt` rounded up to whole pages: cut again
      lengths = self._ledger.lengths.copy()
      for row, _, _, length in starts:
        lengths[row] = length
      self._turn.apply("trim", lengths)


def _count(handle: Handle) -> int:
  """Pages of a swapped sequence."""
  return sum(map(len, handle.held))
