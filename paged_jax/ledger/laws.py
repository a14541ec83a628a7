"""The laws of a ledger, checked."""

from typing import Any

import jax
import jax.numpy as jnp

from paged_jax import groups
from paged_jax.ledger import pool as pool_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.ledger import verbs
from paged_jax.ledger.verbs import Ledgers
from paged_jax.types import Audit, Ledger


def audit(ledger: Ledgers) -> Any:
  """Counts how often each law is broken: an `Audit` of each group.

  >>> import paged_jax
  >>> ledger = paged_jax.ledger.init(paged_jax.CacheConfig(num_rows=2))
  >>> max(audit(ledger)).item()
  0
  """
  ledgers = verbs.each(ledger)
  lengths = ledgers[0].tables.lengths
  return groups.like(ledger, [_audit(one, lengths) for one in ledgers])


def _audit(ledger: Ledger, lengths: jax.Array) -> Audit:
  """Of one group, whose rows should have `lengths` i32[S]."""
  pool, tables, size = ledger.pool, ledger.tables, ledger.page_size
  n = pool.num_pages
  mapped = jnp.where(tables.block_tables >= 0, tables.block_tables, n)
  entries = jnp.zeros(n, jnp.int32).at[mapped.reshape(-1)].add(1, mode="drop")
  empty = jnp.pad(pool.refcount == 0, (0, pool.free.shape[0] * 32 - n))
  first, count = tables_lib.span(tables.starts, tables.lengths, size)
  columns = jnp.arange(ledger.pages_per_row, dtype=jnp.int32)[None, :]
  inside = (columns >= first[:, None]) & (columns < (first + count)[:, None])
  known = (tables.block_tables >= 0) & (tables.block_tables < n)
  sane = (tables.starts >= 0) & (tables.lengths <= ledger.capacity)
  sane &= tables.starts <= tables_lib.latest_start(tables.lengths, ledger.window)

  def total(flags):
    return jnp.sum(flags, dtype=jnp.int32)

  return Audit(
    refcounts=total(pool.refcount != entries + pool.holds),
    holds=total((pool.holds < 0) | (pool.holds > pool.refcount)),
    bitmap=total(jax.lax.population_count(pool.free ^ pool_lib.pack(empty)).astype(jnp.int32)),
    num_free=jnp.abs(pool.num_free - total(empty)),
    tables=total(jnp.where(inside, ~known, tables.block_tables != n)),
    rows=total(~sane),
    cursor=total((pool.cursor < 0) | (pool.cursor >= n)),
    lengths=total(tables.lengths != lengths),
  )
