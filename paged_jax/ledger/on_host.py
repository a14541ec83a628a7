"""The ledger's twin for the host: the commonest verbs in NumPy, bit for bit as `ledger` computes them.

They know one case, which is nearly every one: all is granted. For any other they return None, and the
compiled verb decides. On a CPU that one waits for a thread of the device's program.
"""

import dataclasses
from typing import Any

import numpy as np

from paged_jax.types import Log

Ledger = Any  # a `paged_jax.types.Ledger` of NumPy arrays


def apply(ledger: Ledger, verb: str, operands: tuple[np.ndarray, ...]) -> Ledger | None:
  """The ledger after a verb."""
  known = {"extend": _extend, "free": _free, "hold": _hold, "drop": _drop, "adopt": _adopt}
  return known[verb](ledger, *operands) if verb in known else None


def replay(ledger: Ledger, log: Log) -> Ledger | None:
  """The ledger after a program; None as well if it did more than extend."""
  if log.verbs != ("extend",):
    return None
  num_tokens = np.asarray(log.operands[0][0])
  while len(num_tokens) > 1 and copied(ledger, (num_tokens != 0).any(axis=0)).any():
    ledger, num_tokens = _grow(ledger, num_tokens[:1]), num_tokens[1:]
    if ledger is None:
      return None
  return _grow(ledger, num_tokens) if len(num_tokens) else None


def copied(ledger: Ledger, growing: Any) -> np.ndarray:
  """bool[S] those of the `growing` rows bool[S] that copy a shared tail page: of n sharers, all but the
  last."""
  tables, size = ledger.tables, ledger.page_size
  copying = np.zeros(ledger.num_rows, bool)
  rows = np.flatnonzero(growing & (tables.lengths % size > 0))
  tails = tables.block_tables[rows, tables.lengths[rows] // size]
  shared = ledger.pool.refcount[tails] > 1
  left: dict[int, int] = {}
  for row, page in zip(rows[shared].tolist(), tails[shared].tolist()):
    left.setdefault(page, int(ledger.pool.refcount[page]))
    copying[row] = left[page] > 1
    left[page] -= 1
  return copying


def _extend(ledger: Ledger, num_tokens: np.ndarray) -> Ledger | None:
  return _grow(ledger, num_tokens[None])


def _grow(ledger: Ledger, num_tokens: np.ndarray) -> Ledger | None:
  """Rows grow by `num_tokens` i32[K,S], step by step; if K > 1 none of them copies a page."""
  pool, tables, size = ledger.pool, ledger.tables, ledger.page_size
  copying = copied(ledger, (num_tokens != 0).any(axis=0))
  lengths = np.zeros((1 + len(num_tokens), ledger.num_rows), np.int64)
  np.cumsum(num_tokens, axis=0, out=lengths[1:])
  lengths += tables.lengths
  reached = -(-lengths // size)  # logical pages, before the first step and after each
  reached[0] -= copying  # the copy of the tail comes just before the new pages
  need = np.diff(reached, axis=0)
  lengths, total = lengths[-1].astype(np.int32), int(need.sum())
  valid = (num_tokens >= 0).all() and (reached[-1] <= ledger.pages_per_row).all()
  if not valid or total > pool.num_free or (copying.any() and not ledger.copy_on_write):
    return None
  block_tables = tables.block_tables
  if total:
    free = np.flatnonzero(pool.refcount == 0)
    pages = np.roll(free, -np.searchsorted(free, pool.cursor))[:total]
    takes = np.nonzero(need)  # of all steps and rows, few
    need, first = need[takes], reached[takes]
    rows = np.repeat(takes[1], need)
    columns = np.arange(total) - np.repeat(np.cumsum(need) - need - first, need)
    refcount, block_tables = pool.refcount.copy(), block_tables.copy()
    refcount[pages] = 1
    tails = block_tables[copying, tables.lengths[copying] // size]
    refcount -= _entries(tails, refcount.size)
    block_tables[rows, columns] = pages
    pool = _counted(pool, refcount, pool.holds)
    pool = dataclasses.replace(pool, cursor=np.int32((pages[-1] + 1) % refcount.size))
  tables = dataclasses.replace(
    tables,
    block_tables=block_tables,
    lengths=lengths,
    stale=tables.stale & (lengths == tables.lengths),
  )
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def _free(ledger: Ledger, rows: np.ndarray) -> Ledger | None:
  pool, tables = ledger.pool, ledger.tables
  if (tables.lengths[rows] == 0).any():
    return None
  lengths = np.where(rows, 0, tables.lengths)
  tables = dataclasses.replace(
    tables,
    block_tables=np.where(rows[:, None], np.int32(pool.num_pages), tables.block_tables),
    starts=np.where(lengths > 0, tables.starts, 0),
    lengths=lengths,
    stale=tables.stale & (lengths > 0),
  )
  entries = _entries(ledger.tables.block_tables[rows], pool.num_pages)
  pool = _counted(pool, pool.refcount - entries, pool.holds)
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def _hold(ledger: Ledger, pages: np.ndarray) -> Ledger | None:
  pool = ledger.pool
  entries = _entries(pages, pool.num_pages)
  if (entries[pool.refcount == 0] > 0).any():
    return None
  pool = _counted(pool, pool.refcount + entries, pool.holds + entries)
  return dataclasses.replace(ledger, pool=pool)


def _drop(ledger: Ledger, pages: np.ndarray) -> Ledger | None:
  pool = ledger.pool
  entries = _entries(pages, pool.num_pages)
  if (entries > pool.holds).any():
    return None
  pool = _counted(pool, pool.refcount - entries, pool.holds - entries)
  return dataclasses.replace(ledger, pool=pool)


def _adopt(
  ledger: Ledger, rows: np.ndarray, pages: np.ndarray, lengths: np.ndarray, starts: np.ndarray
) -> Ledger | None:
  pool, tables, size = ledger.pool, ledger.tables, ledger.page_size
  real = rows < ledger.num_rows
  rows, pages, lengths, starts = rows[real], pages[real], lengths[real], starts[real]
  first = np.where(lengths > 0, starts // size, 0)
  count = -(-lengths // size) - first
  entry, nth = np.nonzero(np.arange(pages.shape[1]) < count[:, None])
  used = pages[entry, nth]
  if (
    np.unique(rows).size < rows.size
    or (tables.lengths[rows] > 0).any()
    or ((starts < 0) | (starts > lengths) | (lengths > ledger.capacity)).any()
    or (count > pages.shape[1]).any()
    or ((lengths % size).any() and not ledger.copy_on_write)
    or ((used < 0) | (used >= pool.num_pages)).any()
    or (pool.holds[used] == 0).any()
  ):
    return None
  block_tables, begins, ends, stale = (
    x.copy() for x in (tables.block_tables, tables.starts, tables.lengths, tables.stale)
  )
  block_tables[rows[entry], first[entry] + nth] = used
  begins[rows], ends[rows] = np.where(lengths > 0, starts, 0), lengths
  stale[rows] = lengths > 0
  pool = _counted(pool, pool.refcount + _entries(used, pool.num_pages), pool.holds)
  tables = dataclasses.replace(
    tables, block_tables=block_tables, starts=begins, lengths=ends, stale=stale
  )
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def _entries(pages: np.ndarray, num_pages: int) -> np.ndarray:
  """How often each page is among `pages`, where N is none."""
  return np.bincount(pages.reshape(-1), minlength=num_pages + 1)[:num_pages].astype(np.int32)


def _counted(pool: Any, refcount: np.ndarray, holds: np.ndarray) -> Any:
  """A pool with these holders, and the bitmap and the number of free pages that follow."""
  bits = np.zeros(32 * pool.free.size, bool)
  bits[: refcount.size] = refcount == 0
  return dataclasses.replace(
    pool,
    free=np.packbits(bits, bitorder="little").view("<u4"),
    refcount=refcount,
    holds=holds,
    num_free=np.int32(np.count_nonzero(bits)),
  )
