"""The commonest ledger verbs in NumPy, bit for bit as `paged_jax.ledger` computes them.

They know one case, which is nearly every one: all is granted, and no page is copied. For any other
they return None, and the compiled verb decides. On a CPU that one waits for a thread of the device's
program, and several calls of it are made for each of the device's.
"""

import dataclasses
from typing import Any

import numpy as np

from paged_jax.types import Log

Ledger = Any  # a `paged_jax.types.Ledger` of NumPy arrays


def apply(ledger: Ledger, verb: str, operands: tuple[np.ndarray, ...]) -> Ledger | None:
  """The ledger after a verb."""
  known = {"extend": _extend, "free": _free, "hold": _hold, "drop": _drop}.get(verb)
  return None if known is None else known(ledger, *operands)


def replay(ledger: Ledger, log: Log) -> Ledger | None:
  """The ledger after a program; None as well if it did more than extend."""
  return _grow(ledger, np.asarray(log.operands[0][0])) if log.verbs == ("extend",) else None


def _extend(ledger: Ledger, num_tokens: np.ndarray) -> Ledger | None:
  return _grow(ledger, num_tokens[None])


def _grow(ledger: Ledger, num_tokens: np.ndarray) -> Ledger | None:
  """Rows grow by `num_tokens` i32[K,S], step by step."""
  pool, tables, size = ledger.pool, ledger.tables, ledger.page_size
  after = tables.lengths + np.cumsum(num_tokens, axis=0, dtype=np.int64)
  before, lengths = after - num_tokens, after[-1]
  grown = lengths > tables.lengths
  written = np.flatnonzero(grown & (tables.lengths % size > 0))
  tails = tables.block_tables[written, tables.lengths[written] // size]
  first = -(-before // size)
  need = (-(-after // size) - first).reshape(-1)
  total = int(need.sum())
  if (
    (num_tokens < 0).any()
    or (lengths > ledger.capacity).any()
    or total > pool.num_free
    or (pool.refcount[tails] > 1).any()
  ):
    return None
  tables = dataclasses.replace(
    tables, lengths=lengths.astype(np.int32), stale=tables.stale & ~grown
  )
  if total:
    free = np.flatnonzero(pool.refcount == 0)
    pages = np.roll(free, -np.searchsorted(free, pool.cursor))[:total]
    rows = np.repeat(np.arange(need.size) % ledger.num_rows, need)
    nth = np.arange(total) - np.repeat(np.cumsum(need) - need, need)
    block_tables, refcount = tables.block_tables.copy(), pool.refcount.copy()
    block_tables[rows, np.repeat(first.reshape(-1), need) + nth] = pages
    refcount[pages] = 1
    pool = _counted(pool, refcount, pool.holds)
    pool = dataclasses.replace(pool, cursor=np.int32((pages[-1] + 1) % refcount.size))
    tables = dataclasses.replace(tables, block_tables=block_tables)
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
