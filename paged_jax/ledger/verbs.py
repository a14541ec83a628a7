"""The verbs on integers alone: who holds which page. `cache` adds the bytes.

Every function takes a ledger and a request for all rows at once, and returns the next ledger and
an `Info`. A verb that copies pages also returns the `Copies` to make. Each takes a tuple of ledgers
with the same rows too, and grants an entry in all of them or in none. The public docstrings are in
`paged_jax.cache`.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from paged_jax import arguments, groups, loops
from paged_jax.config import CacheConfig
from paged_jax.ledger import pool as pool_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.types import Info, Ledger, Pool, Tables

Ledgers = TypeVar("Ledgers", Ledger, tuple[Ledger, ...])


def init(config: CacheConfig | tuple[CacheConfig, ...]) -> Any:
  """A ledger whose pages are all free, and whose rows are all empty. A tuple of configs: a tuple."""
  groups.check_rows(groups.each(config))
  made = [
    Ledger(
      pool=pool_lib.init(each.num_pages),
      tables=tables_lib.init(each.num_rows, each.pages_per_row, each.num_pages),
      page_size=each.page_size,
      copy_on_write=each.copy_on_write,
      window=each.window,
    )
    for each in groups.each(config)
  ]
  return groups.like(config, made)


def each(ledger: Ledgers) -> tuple[Ledger, ...]:
  """The ledgers of all groups.

  Raises:
    ValueError: They are none, or differ in what all groups must share.
  """
  ledgers = groups.each(ledger)
  groups.check_rows(ledgers)
  return ledgers


def reported(whole: Ledgers, ledgers: list[Ledger], ok: jax.Array) -> tuple[Ledgers, Info]:
  """`ledgers` of all groups in the form of `whole`, and what a verb reports of them."""
  free = groups.like(whole, [ledger.pool.num_free for ledger in ledgers])
  return groups.like(whole, ledgers), Info(ok, free)


def fork(
  ledger: Ledgers, src: jax.Array, dst: jax.Array, num_tokens: jax.Array | None = None
) -> tuple[Ledgers, Info]:
  """Makes rows `dst` i32[B] share the first `num_tokens` i32[B] tokens of rows `src` i32[B].

  # src          [a][b][c]     1 1 1 holders before, 2 2 1 after
  # dst after    [a][b]        b may be shared in part
  """
  ledgers = each(ledger)
  src = arguments.integers("src", src, (None,))
  dst = arguments.integers("dst", dst, src.shape)
  s = ledgers[0].num_rows
  source = jnp.where((src >= 0) & (src < s), src, s)
  held = ledgers[0].tables.lengths.at[source].get(mode="fill", fill_value=0)
  tokens = held if num_tokens is None else num_tokens
  tokens = arguments.integers("num_tokens", tokens, src.shape)
  valid = (source < s) & groups.all_of(_forkable(one, source, tokens) for one in ledgers)
  target, valid = _vacant(ledgers[0], dst, valid)
  made = [_fork(one, source, target, tokens) for one in ledgers]
  return reported(ledger, made, valid | (dst == s))


def _forkable(ledger: Ledger, source: jax.Array, tokens: jax.Array) -> jax.Array:
  """Whether each of rows `source` i32[B] has the first `tokens` i32[B] to share: bool[B]."""
  tables = ledger.tables
  starts = tables.starts.at[source].get(mode="fill", fill_value=0)
  starts = jnp.where(tokens > 0, starts, 0)
  valid = starts <= tables_lib.latest_start(tokens, ledger.window)
  valid &= tokens <= tables.lengths.at[source].get(mode="fill", fill_value=0)
  return valid if ledger.copy_on_write else valid & (tokens % ledger.page_size == 0)


def _fork(ledger: Ledger, source: jax.Array, target: jax.Array, tokens: jax.Array) -> Ledger:
  """Empty rows `target` i32[B] share `tokens` i32[B] of rows `source` i32[B]; no row at S."""
  tables, s, size = ledger.tables, ledger.num_rows, ledger.page_size
  some = tokens > 0
  held = tables.lengths.at[source].get(mode="fill", fill_value=0)
  starts = jnp.where(some, tables.starts.at[source].get(mode="fill", fill_value=0), 0)
  first, count = tables_lib.span(starts, tokens, size)
  count = jnp.where(target < s, count, 0)

  def retain(pool, entries, nth):
    rows = source.at[entries].get(mode="fill", fill_value=s)
    columns = first.at[entries].get(mode="fill", fill_value=0) + nth
    return pool_lib.retain(
      pool, tables_lib.page_at(tables.block_tables, rows, columns, pool.num_pages)
    )

  pool = loops.fold(count, retain, ledger.pool, chunk=chunk(ledger))
  columns = jnp.arange(ledger.pages_per_row, dtype=jnp.int32)[None, :]
  shared = (columns >= first[:, None]) & (columns < (first + count)[:, None])
  table = tables.block_tables.at[source].get(mode="fill", fill_value=pool.num_pages)
  stale = tables.stale.at[source].get(mode="fill", fill_value=False) | (tokens < held)
  tables = Tables(
    block_tables=tables.block_tables.at[target].set(
      jnp.where(shared, table, pool.num_pages), mode="drop"
    ),
    starts=tables.starts.at[target].set(starts, mode="drop"),
    lengths=tables.lengths.at[target].set(tokens, mode="drop"),
    stale=tables.stale.at[target].set(stale & some, mode="drop"),
  )
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def reorder(ledger: Ledgers, sources: jax.Array) -> tuple[Ledgers, Info]:
  """Makes row r a share of row `sources[r]`, all rows at once; S empties a row.

  # row 0    [a][b]   ──▶   [a][c]       sources 1, 1: row 0 gives up a and b,
  # row 1    [a][c]   ──▶   [a][c]       and becomes a holder of a and c
  """
  ledgers = each(ledger)
  s = ledgers[0].num_rows
  sources = arguments.integers("sources", sources, (s,))
  own = jnp.arange(s, dtype=jnp.int32)
  ok = (sources >= 0) & (sources <= s)
  for one in ledgers:
    if not one.copy_on_write:
      lengths = one.tables.lengths.at[sources].get(mode="fill", fill_value=0)
      ok &= (lengths % one.page_size == 0) | (sources == own)
  sources = jnp.where(ok, sources, own)
  return reported(ledger, [_reorder(one, sources) for one in ledgers], ok)


def _reorder(ledger: Ledger, sources: jax.Array) -> Ledger:
  """Row r becomes a share of row `sources[r]`, i32[S] in 0..S."""
  tables, s, size = ledger.tables, ledger.num_rows, ledger.page_size
  changed = sources != jnp.arange(s, dtype=jnp.int32)
  first, count = tables_lib.span(tables.starts, tables.lengths, size)
  taken = count.at[sources].get(mode="fill", fill_value=0)

  def retain(pool, rows, nth):
    rows = sources.at[rows].get(mode="fill", fill_value=s)
    columns = first.at[rows].get(mode="fill", fill_value=0) + nth
    return pool_lib.retain(
      pool, tables_lib.page_at(tables.block_tables, rows, columns, pool.num_pages)
    )

  pool = loops.fold(jnp.where(changed, taken, 0), retain, ledger.pool, chunk=chunk(ledger))
  shared = Tables(
    block_tables=tables.block_tables.at[sources].get(mode="fill", fill_value=pool.num_pages),
    starts=tables.starts.at[sources].get(mode="fill", fill_value=0),
    lengths=tables.lengths.at[sources].get(mode="fill", fill_value=0),
    stale=tables.stale.at[sources].get(mode="fill", fill_value=False),
  )
  ledger = dataclasses.replace(ledger, pool=pool)
  ledger = unmap(ledger, first, jnp.where(changed, count, 0))
  return dataclasses.replace(ledger, tables=shared)


def trim(ledger: Ledgers, lengths: jax.Array) -> tuple[Ledgers, Info]:
  """Cuts each row to its first `lengths` i32[S] tokens, and gives up whole pages after them."""
  ledgers = each(ledger)
  lengths = arguments.integers("lengths", lengths, (ledgers[0].num_rows,))
  ok = groups.all_of(_trimmable(one, lengths) for one in ledgers)
  return reported(ledger, [_trim(one, lengths, ok) for one in ledgers], ok)


def _trimmable(ledger: Ledger, lengths: jax.Array) -> jax.Array:
  """Which rows have their first `lengths` i32[S] tokens: bool[S]."""
  whole = ledger.tables.starts <= tables_lib.latest_start(lengths, ledger.window)
  return (lengths <= ledger.tables.lengths) & (whole | (lengths == 0)) & (lengths >= 0)


def _trim(ledger: Ledger, lengths: jax.Array, ok: jax.Array) -> Ledger:
  tables, size = ledger.tables, ledger.page_size
  lengths = jnp.where(ok, lengths, tables.lengths)
  starts = jnp.where(lengths > 0, tables.starts, 0)
  first, count = tables_lib.span(tables.starts, tables.lengths, size)
  keep = jnp.where(lengths > 0, tables_lib.num_pages_for(lengths, size) - first, 0)
  ledger = unmap(ledger, first + keep, count - keep)
  tables = dataclasses.replace(
    ledger.tables,
    starts=starts,
    lengths=lengths,
    stale=(tables.stale | (lengths < tables.lengths)) & (lengths > 0),
  )
  return dataclasses.replace(ledger, tables=tables)


def slide(ledger: Ledgers, starts: jax.Array) -> tuple[Ledgers, Info]:
  """Forgets each row's tokens before `starts` i32[S], and gives up whole pages of these."""
  ledgers = each(ledger)
  starts = arguments.integers("starts", starts, (ledgers[0].num_rows,))
  ok = (starts >= 0) & groups.all_of(
    starts <= tables_lib.latest_start(one.tables.lengths, one.window) for one in ledgers
  )
  made = [slid(one, jnp.where(ok, starts, 0)) for one in ledgers]
  return reported(ledger, made, ok)


def slid(ledger: Ledger, starts: jax.Array) -> Ledger:
  """The ledger without tokens before `starts` i32[S], which are not beyond the lengths."""
  tables, size = ledger.tables, ledger.page_size
  starts = jnp.maximum(starts, tables.starts)
  first, count = tables_lib.span(tables.starts, tables.lengths, size)
  passed = jnp.minimum(starts // size - first, count)
  ledger = unmap(ledger, first, passed)
  tables = dataclasses.replace(ledger.tables, starts=starts)
  return dataclasses.replace(ledger, tables=tables)


def free(ledger: Ledgers, rows: jax.Array) -> tuple[Ledgers, Info]:
  """Empties the rows marked in `rows` bool[S]: they give up all their pages."""
  ledgers = each(ledger)
  rows = arguments.booleans("rows", rows, (ledgers[0].num_rows,))
  held = ledgers[0].tables.lengths
  made = [_trim(one, jnp.zeros_like(held), rows) for one in ledgers]
  return reported(ledger, made, ~rows | (held > 0))


def hold(ledger: Ledgers, pages: jax.Array) -> tuple[Ledgers, Info]:
  """Adds a hold of the host for each entry of `pages` i32[B], of each group."""
  listed = groups.values_for("pages", pages, ledger)
  return _apart(ledger, [_hold(*both) for both in zip(each(ledger), listed)])


def _hold(ledger: Ledger, pages: jax.Array) -> tuple[Ledger, Info]:
  pages = arguments.integers("pages", pages, (None,))
  n = ledger.pool.num_pages
  ok = (pages >= 0) & (pages < n)
  ok &= pool_lib.refcounts(ledger.pool, jnp.where(ok, pages, n)) > 0
  pool = pool_lib.hold(ledger.pool, jnp.where(ok, pages, n))
  return dataclasses.replace(ledger, pool=pool), Info(ok | (pages == n), pool.num_free)


def drop(ledger: Ledgers, pages: jax.Array) -> tuple[Ledgers, Info]:
  """Removes a hold of the host for each entry of `pages` i32[B], of each group."""
  listed = groups.values_for("pages", pages, ledger)
  return _apart(ledger, [_drop(*both) for both in zip(each(ledger), listed)])


def _drop(ledger: Ledger, pages: jax.Array) -> tuple[Ledger, Info]:
  pages = arguments.integers("pages", pages, (None,))
  n = ledger.pool.num_pages
  known = jnp.where((pages >= 0) & (pages < n), pages, n)
  holds = ledger.pool.holds.at[known].get(mode="fill", fill_value=0)
  ok = loops.earlier(known) < holds
  pool = pool_lib.drop(ledger.pool, jnp.where(ok, known, n))
  return dataclasses.replace(ledger, pool=pool), Info(ok | (pages == n), pool.num_free)


def _apart(ledger: Ledgers, made: list[tuple[Ledger, Info]]) -> tuple[Ledgers, Info]:
  """What each group made of pages of its own; also the report is one of each group."""
  info = Info(*(groups.like(ledger, column) for column in zip(*(info for _, info in made))))
  return groups.like(ledger, [one for one, _ in made]), info


def adopt(
  ledger: Ledgers, rows: jax.Array, pages: Any, lengths: jax.Array, starts: Any = None
) -> tuple[Ledgers, Info]:
  """Starts empty rows i32[B] on held `pages` i32[B,C], with `lengths` i32[B] tokens.

  # host         [a][b]     1 1 holders before
  # row after    [a][b]     2 2 holders: the host's holds remain
  """
  ledgers = each(ledger)
  rows = arguments.integers("rows", rows, (None,))
  lengths = arguments.integers("lengths", lengths, rows.shape)
  if starts is None:
    starts = groups.like(ledger, [jnp.zeros_like(lengths)] * len(ledgers))
  adopted = [
    (
      arguments.integers("pages", own, (*rows.shape, None)),
      arguments.integers("starts", begins, rows.shape),
    )
    for own, begins in zip(
      groups.values_for("pages", pages, ledger), groups.values_for("starts", starts, ledger)
    )
  ]
  valid = groups.all_of(
    _adoptable(one, own, lengths, begins) for one, (own, begins) in zip(ledgers, adopted)
  )
  target, valid = _vacant(ledgers[0], rows, valid)
  made = [_adopt(one, target, own, lengths, begins) for one, (own, begins) in zip(ledgers, adopted)]
  return reported(ledger, made, valid | (rows == ledgers[0].num_rows))


def _adoptable(
  ledger: Ledger, pages: jax.Array, lengths: jax.Array, starts: jax.Array
) -> jax.Array:
  """Which entries list held pages i32[B,C] for all tokens `starts..lengths` i32[B]: bool[B]."""
  valid = (starts >= 0) & (lengths <= ledger.capacity)
  valid &= starts <= tables_lib.latest_start(lengths, ledger.window)
  if not ledger.copy_on_write:
    valid &= lengths % ledger.page_size == 0
  _, count, known = _listed(ledger, pages, jnp.where(valid, lengths, 0), starts)
  held = ledger.pool.holds.at[known].get(mode="fill", fill_value=0) > 0
  beyond = jnp.arange(pages.shape[1], dtype=jnp.int32)[None, :] >= count[:, None]
  return valid & (count <= pages.shape[1]) & jnp.all(held | beyond, axis=1)


def _adopt(
  ledger: Ledger, target: jax.Array, pages: jax.Array, lengths: jax.Array, starts: jax.Array
) -> Ledger:
  """Empty rows `target` i32[B] take the tokens `starts..lengths` of `pages`; no row at S."""
  tables, taken = ledger.tables, target < ledger.num_rows
  first, _, known = _listed(ledger, pages, jnp.where(taken, lengths, 0), starts)
  pool = pool_lib.retain(ledger.pool, known.reshape(-1))
  columns = first[:, None] + jnp.arange(pages.shape[1], dtype=jnp.int32)[None, :]
  tables = Tables(
    block_tables=tables.block_tables.at[target[:, None], columns].set(known, mode="drop"),
    starts=tables.starts.at[target].set(jnp.where(lengths > 0, starts, 0), mode="drop"),
    lengths=tables.lengths.at[target].set(lengths, mode="drop"),
    stale=tables.stale.at[target].set(lengths > 0, mode="drop"),
  )
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def _listed(
  ledger: Ledger, pages: jax.Array, lengths: jax.Array, starts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """First logical page and number of pages i32[B] of each entry, and these pages, N elsewhere."""
  n = ledger.pool.num_pages
  first, count = tables_lib.span(starts, lengths, ledger.page_size)
  listed = jnp.arange(pages.shape[1], dtype=jnp.int32)[None, :] < count[:, None]
  return first, count, jnp.where(listed & (pages >= 0) & (pages < n), pages, n)


def _vacant(ledger: Ledger, rows: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which entries of `rows` are granted: `valid` ones that name an empty row, each row once.

  Returns:
    The rows (S where not granted), and which entries are granted.
  """
  s = ledger.num_rows
  valid &= (rows >= 0) & (rows < s)
  target = jnp.where(valid, rows, s)
  valid &= ledger.tables.lengths.at[target].get(mode="fill", fill_value=1) == 0
  target = jnp.where(valid, rows, s)
  valid &= loops.earlier(target) == 0
  return jnp.where(valid, rows, s), valid


def unmap(ledger: Ledger, first: jax.Array, count: jax.Array) -> Ledger:
  """Releases `count` i32[S] logical pages of each row, from `first` i32[S] on."""
  none = ledger.pool.num_pages

  def step(carry: tuple[Pool, jax.Array], rows, nth):
    pool, block_tables = carry
    columns = first.at[rows].get(mode="fill", fill_value=0) + nth
    pages = tables_lib.page_at(block_tables, rows, columns, none)
    return pool_lib.release(pool, pages), block_tables.at[rows, columns].set(none, mode="drop")

  pool, block_tables = loops.fold(
    count, step, (ledger.pool, ledger.tables.block_tables), chunk=chunk(ledger)
  )
  tables = dataclasses.replace(ledger.tables, block_tables=block_tables)
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def chunk(ledger: Ledger) -> int:
  """Pages handled in one turn of a loop: the number of rows, but between 32 and 512."""
  return min(max(ledger.num_rows, 32), 512)
