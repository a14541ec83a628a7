"""The verbs on integers alone: who holds which page. `cache` adds the bytes.

Every function takes a ledger and a request for all rows at once, and returns the next ledger and
an `Info`. A verb that copies pages also returns the `Copies` to make. The public docstrings are in
`paged_jax.cache`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paged_jax import arguments, loops
from paged_jax.config import CacheConfig
from paged_jax.ledger import pool as pool_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.types import Copies, Info, Ledger, Pool, Tables


def init(config: CacheConfig) -> Ledger:
  """A ledger whose pages are all free, and whose rows are all empty."""
  return Ledger(
    pool=pool_lib.init(config.num_pages),
    tables=tables_lib.init(config.num_rows, config.pages_per_row, config.num_pages),
    page_size=config.page_size,
    copy_on_write=config.copy_on_write,
  )


def pages_needed(ledger: Ledger, num_tokens: jax.Array) -> jax.Array:
  """Pages that `extend` would take for each row, i32[S]."""
  growth = _growth(ledger, num_tokens)
  return growth.num_new + growth.copied


def extend(ledger: Ledger, num_tokens: jax.Array) -> tuple[Ledger, Info, Copies]:
  """Makes room for `num_tokens` i32[S] more tokens in each row.

  # row before   [a     ][b  ]           others hold b too
  # row after    [a     ][c     ][d ]    the row takes c, a copy of b, and d, and gives up b
  """
  growth = _growth(ledger, num_tokens)
  pool, tables = ledger.pool, ledger.tables
  need = growth.num_new + growth.copied
  fits = jnp.cumsum(need, dtype=jnp.int32) <= pool.num_free
  copied = jnp.where(fits, growth.copied, 0)
  num_new = jnp.where(fits, growth.num_new, 0)
  need = num_new + copied
  tail = growth.num_pages - 1
  first = growth.num_pages - copied  # the copy of the tail comes just before the new pages

  def place(block_tables, ranks, pages):
    rows, nth = loops.locate(need, ranks)
    rows = jnp.where(pages < pool.num_pages, rows, ledger.num_rows)
    columns = first.at[rows].get(mode="fill", fill_value=0) + nth
    return block_tables.at[rows, columns].set(pages, mode="drop")

  pool, block_tables = pool_lib.take(
    pool, jnp.sum(need, dtype=jnp.int32), place, tables.block_tables, chunk=_chunk(ledger)
  )
  pool = pool_lib.release(pool, jnp.where(copied > 0, growth.tail_page, pool.num_pages))
  # After a refused row, the last sharer of a tail page still has another holder on it.
  alone = pool_lib.refcounts(pool, growth.tail_page) <= 1
  ok = growth.valid & (fits | ((growth.num_new + growth.copied == 0) & alone))
  extended = ok & (growth.lengths > tables.lengths)
  renewed = extended & ((copied > 0) | (tables.stale & (growth.tail_page < pool.num_pages)))
  copies = Copies(
    sources=jnp.where(renewed, growth.tail_page, pool.num_pages)[:, None],
    first=jnp.where(renewed, tail, growth.num_pages),
    num_pages=num_new + renewed.astype(jnp.int32),
    lengths=tables.lengths,
  )
  tables = Tables(
    block_tables=block_tables,
    starts=tables.starts,
    lengths=jnp.where(ok, growth.lengths, tables.lengths),
    stale=tables.stale & ~extended,
  )
  ledger = dataclasses.replace(ledger, pool=pool, tables=tables)
  return ledger, Info(ok, pool.num_free), copies


class _Growth(NamedTuple):
  """What `extend` asks for each row, whether or not enough pages are free."""

  valid: jax.Array  # bool[S] the count is not negative and fits the row
  lengths: jax.Array  # i32[S] tokens afterwards
  num_pages: jax.Array  # i32[S] logical pages before
  num_new: jax.Array  # i32[S] whole new pages
  tail_page: jax.Array  # i32[S] the partly filled page that will be written, N if none
  copied: jax.Array  # i32[S] 1 if the tail page must be copied first


def _growth(ledger: Ledger, num_tokens: jax.Array) -> _Growth:
  """What `extend` by `num_tokens` i32[S] asks for each row."""
  num_tokens = arguments.integers("num_tokens", num_tokens, (ledger.num_rows,))
  pool, tables, size = ledger.pool, ledger.tables, ledger.page_size
  valid = (num_tokens >= 0) & (num_tokens <= ledger.capacity - tables.lengths)
  num_pages = tables_lib.num_pages_for(tables.lengths, size)

  rows = jnp.arange(ledger.num_rows, dtype=jnp.int32)
  tail = tables_lib.page_at(tables.block_tables, rows, num_pages - 1, pool.num_pages)
  written = (num_tokens > 0) & (tables.lengths % size > 0)
  if not ledger.copy_on_write:
    valid &= ~written | (pool_lib.refcounts(pool, tail) <= 1)
  tail = jnp.where(valid & written, tail, pool.num_pages)
  lengths = tables.lengths + jnp.where(valid, num_tokens, 0)
  return _Growth(
    valid=valid,
    lengths=lengths,
    num_pages=num_pages,
    num_new=tables_lib.num_pages_for(lengths, size) - num_pages,
    tail_page=tail,
    # Row by row: of n sharers the first n - 1 copy the page, and the last one keeps it.
    copied=(pool_lib.refcounts(pool, tail) - _earlier(tail) > 1).astype(jnp.int32),
  )


def fork(
  ledger: Ledger, src: jax.Array, dst: jax.Array, num_tokens: jax.Array | None = None
) -> tuple[Ledger, Info]:
  """Makes rows `dst` i32[B] share the first `num_tokens` i32[B] tokens of rows `src` i32[B].

  # src          [a][b][c]     1 1 1 holders before, 2 2 1 after
  # dst after    [a][b]        b may be shared in part
  """
  src = arguments.integers("src", src, (None,))
  dst = arguments.integers("dst", dst, src.shape)
  tables, s, size = ledger.tables, ledger.num_rows, ledger.page_size
  known = (src >= 0) & (src < s)
  source = jnp.where(known, src, s)
  held = tables.lengths.at[source].get(mode="fill", fill_value=0)
  starts = tables.starts.at[source].get(mode="fill", fill_value=0)
  tokens = held if num_tokens is None else num_tokens
  tokens = arguments.integers("num_tokens", tokens, src.shape)
  some = tokens > 0
  starts = jnp.where(some, starts, 0)

  valid = known & (tokens >= starts) & (tokens <= held)
  if not ledger.copy_on_write:
    valid &= tokens % size == 0
  padding = dst == s
  target, valid = _vacant(ledger, dst, valid)
  first, count = tables_lib.span(starts, tokens, size)
  count = jnp.where(valid, count, 0)

  def retain(pool, entries, nth):
    rows = source.at[entries].get(mode="fill", fill_value=s)
    columns = first.at[entries].get(mode="fill", fill_value=0) + nth
    return pool_lib.retain(
      pool, tables_lib.page_at(tables.block_tables, rows, columns, pool.num_pages)
    )

  pool = loops.fold(count, retain, ledger.pool, chunk=_chunk(ledger))
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
  ledger = dataclasses.replace(ledger, pool=pool, tables=tables)
  return ledger, Info(valid | padding, pool.num_free)


def reorder(ledger: Ledger, sources: jax.Array) -> tuple[Ledger, Info]:
  """Makes row r a share of row `sources[r]`, all rows at once; S empties a row.

  # row 0    [a][b]   ──▶   [a][c]       sources 1, 1: row 0 gives up a and b,
  # row 1    [a][c]   ──▶   [a][c]       and becomes a holder of a and c
  """
  tables, s, size = ledger.tables, ledger.num_rows, ledger.page_size
  sources = arguments.integers("sources", sources, (s,))
  own = jnp.arange(s, dtype=jnp.int32)
  ok = (sources >= 0) & (sources <= s)
  if not ledger.copy_on_write:
    whole = tables.lengths.at[sources].get(mode="fill", fill_value=0) % size == 0
    ok &= whole | (sources == own)
  sources = jnp.where(ok, sources, own)
  changed = sources != own

  first, count = tables_lib.span(tables.starts, tables.lengths, size)
  taken = count.at[sources].get(mode="fill", fill_value=0)

  def retain(pool, rows, nth):
    rows = sources.at[rows].get(mode="fill", fill_value=s)
    columns = first.at[rows].get(mode="fill", fill_value=0) + nth
    return pool_lib.retain(
      pool, tables_lib.page_at(tables.block_tables, rows, columns, pool.num_pages)
    )

  pool = loops.fold(jnp.where(changed, taken, 0), retain, ledger.pool, chunk=_chunk(ledger))
  shared = Tables(
    block_tables=tables.block_tables.at[sources].get(mode="fill", fill_value=pool.num_pages),
    starts=tables.starts.at[sources].get(mode="fill", fill_value=0),
    lengths=tables.lengths.at[sources].get(mode="fill", fill_value=0),
    stale=tables.stale.at[sources].get(mode="fill", fill_value=False),
  )
  ledger = dataclasses.replace(ledger, pool=pool)
  ledger = _unmap(ledger, first, jnp.where(changed, count, 0))
  ledger = dataclasses.replace(ledger, tables=shared)
  return ledger, Info(ok, ledger.pool.num_free)


def unshare(ledger: Ledger, starts: jax.Array) -> tuple[Ledger, Info, Copies]:
  """Makes each row the only holder of its pages from the one of token `starts` i32[S] on.

  # row before   [a][b][c]      others hold a and b too; `starts` is on b
  # row after    [a][d][c]      the row takes d, a copy of b, and gives up b
  """
  s, size, n = ledger.num_rows, ledger.page_size, ledger.pool.num_pages
  tables = ledger.tables
  starts = arguments.integers("starts", starts, (s,))
  valid = (starts >= 0) & (starts <= tables.lengths)
  first, count = tables_lib.span(
    jnp.maximum(starts, tables.starts), jnp.where(starts < tables.lengths, tables.lengths, 0), size
  )
  count = jnp.where(valid, count, 0)
  columns = jnp.arange(ledger.pages_per_row, dtype=jnp.int32)

  def turn(row, state):
    pool, block_tables, ok, first_copied, num_copied, waiting = state
    table = block_tables[row]
    inside = (columns >= first[row]) & (columns < first[row] + count[row])
    shared = inside & (pool_lib.refcounts(pool, table) > 1)
    need = jnp.sum(shared, dtype=jnp.int32)
    short = valid[row] & (need > 0) & (waiting | (need > pool.num_free))
    granted = valid[row] & ~short
    if not ledger.copy_on_write:
      short, granted = jnp.bool_(False), granted & (need == 0)
    shared &= granted
    ranks = jnp.cumsum(shared, dtype=jnp.int32) - 1
    pool, taken = pool_lib.take(
      pool,
      jnp.where(granted, need, 0),
      lambda taken, ranks, pages: taken.at[ranks].set(pages, mode="drop"),
      jnp.full_like(table, n),
      chunk=min(_chunk(ledger), ledger.pages_per_row),
    )
    pool = pool_lib.release(pool, jnp.where(shared, table, n))
    table = jnp.where(shared, taken.at[ranks].get(mode="fill", fill_value=n), table)
    # The pages to copy: from the first shared page to the last one, with those between.
    begin = jnp.min(jnp.where(shared, columns, ledger.pages_per_row))
    end = jnp.max(jnp.where(shared, columns + 1, 0))
    return (
      pool,
      block_tables.at[row].set(table),
      ok.at[row].set(granted),
      first_copied.at[row].set(begin),
      num_copied.at[row].set(jnp.maximum(end - begin, 0)),
      waiting | short,
    )

  zeros = jnp.zeros(s, jnp.int32)
  state = (ledger.pool, tables.block_tables, valid, zeros, zeros, jnp.bool_(False))
  pool, block_tables, ok, begin, num_copied, _ = jax.lax.fori_loop(0, s, turn, state)
  tail = tables_lib.num_pages_for(tables.lengths, size)
  renewed = (num_copied > 0) & (begin + num_copied == tail)
  copies = Copies(
    sources=tables_lib.page_at(
      tables.block_tables, jnp.arange(s)[:, None], begin[:, None] + columns[None, :], n
    ),
    first=begin,
    num_pages=num_copied,
    lengths=tables.lengths,
  )
  tables = dataclasses.replace(tables, block_tables=block_tables, stale=tables.stale & ~renewed)
  ledger = dataclasses.replace(ledger, pool=pool, tables=tables)
  return ledger, Info(ok, pool.num_free), copies


def trim(ledger: Ledger, lengths: jax.Array) -> tuple[Ledger, Info]:
  """Cuts each row to its first `lengths` i32[S] tokens, and gives up whole pages after them."""
  tables, size = ledger.tables, ledger.page_size
  lengths = arguments.integers("lengths", lengths, (ledger.num_rows,))
  ok = (lengths <= tables.lengths) & ((lengths >= tables.starts) | (lengths == 0)) & (lengths >= 0)
  lengths = jnp.where(ok, lengths, tables.lengths)
  starts = jnp.where(lengths > 0, tables.starts, 0)
  first, count = tables_lib.span(tables.starts, tables.lengths, size)
  keep = jnp.where(lengths > 0, tables_lib.num_pages_for(lengths, size) - first, 0)
  ledger = _unmap(ledger, first + keep, count - keep)
  tables = dataclasses.replace(
    ledger.tables,
    starts=starts,
    lengths=lengths,
    stale=(tables.stale | (lengths < tables.lengths)) & (lengths > 0),
  )
  return dataclasses.replace(ledger, tables=tables), Info(ok, ledger.pool.num_free)


def slide(ledger: Ledger, starts: jax.Array) -> tuple[Ledger, Info]:
  """Forgets each row's tokens before `starts` i32[S], and gives up whole pages of these."""
  tables, size = ledger.tables, ledger.page_size
  starts = arguments.integers("starts", starts, (ledger.num_rows,))
  ok = (starts >= 0) & (starts <= tables.lengths)
  starts = jnp.where(ok, jnp.maximum(starts, tables.starts), tables.starts)
  first, count = tables_lib.span(tables.starts, tables.lengths, size)
  passed = jnp.minimum(starts // size - first, count)
  ledger = _unmap(ledger, first, passed)
  tables = dataclasses.replace(ledger.tables, starts=starts)
  return dataclasses.replace(ledger, tables=tables), Info(ok, ledger.pool.num_free)


def free(ledger: Ledger, rows: jax.Array) -> tuple[Ledger, Info]:
  """Empties the rows marked in `rows` bool[S]: they give up all their pages."""
  rows = arguments.booleans("rows", rows, (ledger.num_rows,))
  tables = ledger.tables
  ok = ~rows | (tables.lengths > 0)
  ledger, info = trim(ledger, jnp.where(rows, 0, tables.lengths))
  return ledger, info._replace(ok=ok)


def hold(ledger: Ledger, pages: jax.Array) -> tuple[Ledger, Info]:
  """Adds a hold of the host for each entry of `pages` i32[B]."""
  pages = arguments.integers("pages", pages, (None,))
  n = ledger.pool.num_pages
  ok = (pages >= 0) & (pages < n)
  ok &= pool_lib.refcounts(ledger.pool, jnp.where(ok, pages, n)) > 0
  pool = pool_lib.hold(ledger.pool, jnp.where(ok, pages, n))
  return dataclasses.replace(ledger, pool=pool), Info(ok | (pages == n), pool.num_free)


def drop(ledger: Ledger, pages: jax.Array) -> tuple[Ledger, Info]:
  """Removes a hold of the host for each entry of `pages` i32[B]."""
  pages = arguments.integers("pages", pages, (None,))
  n = ledger.pool.num_pages
  known = jnp.where((pages >= 0) & (pages < n), pages, n)
  holds = ledger.pool.holds.at[known].get(mode="fill", fill_value=0)
  ok = _earlier(known) < holds
  pool = pool_lib.drop(ledger.pool, jnp.where(ok, known, n))
  return dataclasses.replace(ledger, pool=pool), Info(ok | (pages == n), pool.num_free)


def adopt(
  ledger: Ledger,
  rows: jax.Array,
  pages: jax.Array,
  lengths: jax.Array,
  starts: jax.Array | None = None,
) -> tuple[Ledger, Info]:
  """Starts empty rows i32[B] on held `pages` i32[B,C], with `lengths` i32[B] tokens.

  # host         [a][b]     1 1 holders before
  # row after    [a][b]     2 2 holders: the host's holds remain
  """
  rows = arguments.integers("rows", rows, (None,))
  pages = arguments.integers("pages", pages, (*rows.shape, None))
  lengths = arguments.integers("lengths", lengths, rows.shape)
  begins = jnp.zeros_like(lengths) if starts is None else starts
  begins = arguments.integers("starts", begins, rows.shape)
  s, n, size = ledger.num_rows, ledger.pool.num_pages, ledger.page_size
  tables = ledger.tables

  valid = (begins >= 0) & (begins <= lengths) & (lengths <= ledger.capacity)
  if not ledger.copy_on_write:
    valid &= lengths % size == 0
  first, count = tables_lib.span(begins, jnp.where(valid, lengths, 0), size)
  listed = jnp.arange(pages.shape[1], dtype=jnp.int32)[None, :] < count[:, None]
  known = jnp.where(listed & (pages >= 0) & (pages < n), pages, n)
  held = ledger.pool.holds.at[known].get(mode="fill", fill_value=0) > 0
  valid &= (count <= pages.shape[1]) & jnp.all(held | ~listed, axis=1)
  padding = rows == s
  target, valid = _vacant(ledger, rows, valid)

  pool = pool_lib.retain(ledger.pool, jnp.where(valid[:, None], known, n).reshape(-1))
  columns = first[:, None] + jnp.arange(pages.shape[1], dtype=jnp.int32)[None, :]
  tables = Tables(
    block_tables=tables.block_tables.at[target[:, None], columns].set(known, mode="drop"),
    starts=tables.starts.at[target].set(jnp.where(lengths > 0, begins, 0), mode="drop"),
    lengths=tables.lengths.at[target].set(lengths, mode="drop"),
    stale=tables.stale.at[target].set(lengths > 0, mode="drop"),
  )
  ledger = dataclasses.replace(ledger, pool=pool, tables=tables)
  return ledger, Info(valid | padding, pool.num_free)


def take_held(ledger: Ledger, count: jax.Array, size: int) -> tuple[Ledger, jax.Array, Info]:
  """Takes `count` i32[] free pages, which the host then holds, all or none.

  Returns:
    The next ledger, the pages i32[size] (N past the last), and `Info` with ok bool[].
  """
  count = arguments.integers("count", count, ())
  pool, n = ledger.pool, ledger.pool.num_pages
  ok = (count >= 0) & (count <= jnp.minimum(size, pool.num_free))
  pool, pages = pool_lib.take(
    pool,
    jnp.where(ok, count, 0),
    lambda taken, ranks, pages: taken.at[ranks].set(pages, mode="drop"),
    jnp.full(size, n, jnp.int32),
    chunk=min(_chunk(ledger), size),
  )
  pool = pool_lib.claim(pool, pages)
  return dataclasses.replace(ledger, pool=pool), pages, Info(ok, pool.num_free)


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
  valid &= _earlier(target) == 0
  return jnp.where(valid, rows, s), valid


def _unmap(ledger: Ledger, first: jax.Array, count: jax.Array) -> Ledger:
  """Releases `count` i32[S] logical pages of each row, from `first` i32[S] on."""
  none = ledger.pool.num_pages

  def step(carry: tuple[Pool, jax.Array], rows, nth):
    pool, block_tables = carry
    columns = first.at[rows].get(mode="fill", fill_value=0) + nth
    pages = tables_lib.page_at(block_tables, rows, columns, none)
    return pool_lib.release(pool, pages), block_tables.at[rows, columns].set(none, mode="drop")

  pool, block_tables = loops.fold(
    count, step, (ledger.pool, ledger.tables.block_tables), chunk=_chunk(ledger)
  )
  tables = dataclasses.replace(ledger.tables, block_tables=block_tables)
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def _earlier(ids: jax.Array) -> jax.Array:
  """For each entry of `ids` i32[B], how many earlier entries are equal."""
  order = jnp.arange(ids.shape[0], dtype=jnp.int32)
  same = (ids[:, None] == ids[None, :]) & (order[:, None] < order[None, :])
  return jnp.sum(same, axis=0, dtype=jnp.int32)  # over the outer axis, where CPUs use all lanes


def _chunk(ledger: Ledger) -> int:
  """Pages handled in one turn of a loop: the number of rows, but between 32 and 512."""
  return min(max(ledger.num_rows, 32), 512)
