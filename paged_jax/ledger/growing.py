"""The verbs that take pages: room for more tokens, private copies, pages for the host.

The public docstrings are in `paged_jax.cache`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paged_jax import arguments, groups, loops
from paged_jax.ledger import pool as pool_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.ledger import verbs
from paged_jax.ledger.verbs import Ledgers
from paged_jax.types import Copies, Info, Ledger, Pool, Tables


def pages_needed(ledger: Ledgers, num_tokens: jax.Array) -> Any:
  """Pages that `extend` would take for each row, i32[S], of each group."""
  _, growths = _growths(ledger, num_tokens)
  return groups.like(ledger, [growth.num_new + growth.copied for growth in growths])


def extend(ledger: Ledgers, num_tokens: jax.Array) -> tuple[Ledgers, Info, Any]:
  """Makes room for `num_tokens` i32[S] more tokens in each row.

  # row before   [a     ][b  ]           others hold b too
  # row after    [a     ][c     ][d ]    the row takes c, a copy of b, and d, and gives up b
  """
  ledgers, growths = _growths(ledger, num_tokens)
  need = [growth.num_new + growth.copied for growth in growths]
  fits = groups.all_of(
    jnp.cumsum(each, dtype=jnp.int32) <= one.pool.num_free for each, one in zip(need, ledgers)
  )
  grown = [_grown(one, growth, fits) for one, growth in zip(ledgers, growths)]
  # After a refused row, the last sharer of a tail page still has another holder on it.
  kept = groups.all_of(
    (each == 0) & (pool_lib.refcounts(one.pool, growth.tail_page) <= 1)
    for each, one, growth in zip(need, grown, growths)
  )
  ok = growths[0].valid & (fits | kept)
  made = [_lengthened(one, growth, ok) for one, growth in zip(grown, growths)]
  ledger, info = verbs.reported(ledger, [one for one, _ in made], ok)
  return ledger, info, groups.like(ledger, [copies for _, copies in made])


class _Growth(NamedTuple):
  """What `extend` asks for each row of a group, whether or not enough pages are free."""

  valid: jax.Array  # bool[S] the count is not negative and fits the row, in every group
  lengths: jax.Array  # i32[S] tokens afterwards
  num_pages: jax.Array  # i32[S] logical pages before
  num_new: jax.Array  # i32[S] whole new pages
  tail_page: jax.Array  # i32[S] the partly filled page that will be written, N if none
  copied: jax.Array  # i32[S] 1 if the tail page must be copied first


def _growths(ledger: Ledgers, num_tokens: jax.Array) -> tuple[list[Ledger], list[_Growth]]:
  """The groups without what no later token sees, and what `extend` then asks of each of them.

  # window 4, row before   [a b c d][e . . .]      the next token sees c d e and itself: nothing goes
  # one token later        [a b c d][e f . .]      d e f
  # three tokens later     [- - - -][e f g h][i .  the page of a to d is free
  """
  ledgers = verbs.each(ledger)
  num_tokens = arguments.integers("num_tokens", num_tokens, (ledgers[0].num_rows,))
  lengths = ledgers[0].tables.lengths
  room = min(one.capacity for one in ledgers) - lengths
  valid = (num_tokens >= 0) & (num_tokens <= room)
  ledgers = [_windowed(one, valid & (num_tokens > 0)) for one in ledgers]
  tails = [_tail(one, num_tokens) for one in ledgers]
  for one, tail in zip(ledgers, tails):
    if not one.copy_on_write:
      valid &= pool_lib.refcounts(one.pool, tail) <= 1
  lengths = lengths + jnp.where(valid, num_tokens, 0)
  return ledgers, [_growth(one, lengths, tail, valid) for one, tail in zip(ledgers, tails)]


def _windowed(ledger: Ledger, rows: jax.Array) -> Ledger:
  """Each of `rows` bool[S] has given up the tokens that its next one does not see."""
  if ledger.window is None:
    return ledger
  starts = tables_lib.latest_start(ledger.tables.lengths, ledger.window)
  return verbs.slid(ledger, jnp.where(rows, starts, 0))


def _tail(ledger: Ledger, num_tokens: jax.Array) -> jax.Array:
  """The partly filled page of each row that gets tokens, i32[S], N if there is none."""
  tables, size = ledger.tables, ledger.page_size
  rows = jnp.arange(ledger.num_rows, dtype=jnp.int32)
  none = ledger.pool.num_pages
  tail = tables_lib.page_at(tables.block_tables, rows, tables.lengths // size, none)
  return jnp.where((num_tokens > 0) & (tables.lengths % size > 0), tail, none)


def _growth(ledger: Ledger, lengths: jax.Array, tail: jax.Array, valid: jax.Array) -> _Growth:
  pool, size = ledger.pool, ledger.page_size
  num_pages = tables_lib.num_pages_for(ledger.tables.lengths, size)
  tail = jnp.where(valid, tail, pool.num_pages)
  return _Growth(
    valid=valid,
    lengths=lengths,
    num_pages=num_pages,
    num_new=tables_lib.num_pages_for(lengths, size) - num_pages,
    tail_page=tail,
    # Row by row: of n sharers the first n - 1 copy the page, and the last one keeps it.
    copied=(pool_lib.refcounts(pool, tail) - loops.earlier(tail) > 1).astype(jnp.int32),
  )


def _grown(ledger: Ledger, growth: _Growth, fits: jax.Array) -> Ledger:
  """The pages of the rows that fit bool[S] are theirs; lengths are as before."""
  pool, tables = ledger.pool, ledger.tables
  copied = jnp.where(fits, growth.copied, 0)
  need = jnp.where(fits, growth.num_new, 0) + copied
  first = growth.num_pages - copied  # the copy of the tail comes just before the new pages

  def place(block_tables, ranks, pages):
    rows, nth = loops.locate(need, ranks)
    rows = jnp.where(pages < pool.num_pages, rows, ledger.num_rows)
    columns = first.at[rows].get(mode="fill", fill_value=0) + nth
    return block_tables.at[rows, columns].set(pages, mode="drop")

  pool, block_tables = pool_lib.take(
    pool, jnp.sum(need, dtype=jnp.int32), place, tables.block_tables, chunk=verbs.chunk(ledger)
  )
  pool = pool_lib.release(pool, jnp.where(copied > 0, growth.tail_page, pool.num_pages))
  tables = dataclasses.replace(tables, block_tables=block_tables)
  return dataclasses.replace(ledger, pool=pool, tables=tables)


def _lengthened(ledger: Ledger, growth: _Growth, ok: jax.Array) -> tuple[Ledger, Copies]:
  """The rows in `ok` bool[S] are longer; the pages to copy and to clear."""
  tables, none = ledger.tables, ledger.pool.num_pages
  extended = ok & (growth.lengths > tables.lengths)
  copied = ok & (growth.copied > 0)
  renewed = extended & (copied | (tables.stale & (growth.tail_page < none)))
  copies = Copies(
    sources=jnp.where(renewed, growth.tail_page, none)[:, None],
    first=jnp.where(renewed, growth.num_pages - 1, growth.num_pages),
    num_pages=jnp.where(ok, growth.num_new, 0) + renewed.astype(jnp.int32),
    lengths=tables.lengths,
  )
  tables = dataclasses.replace(
    tables,
    lengths=jnp.where(ok, growth.lengths, tables.lengths),
    stale=tables.stale & ~extended,
  )
  return dataclasses.replace(ledger, tables=tables), copies


def unshare(ledger: Ledgers, starts: jax.Array) -> tuple[Ledgers, Info, Any]:
  """Makes each row the only holder of its pages from the one of token `starts` i32[S] on.

  # row before   [a][b][c]      others hold a and b too; `starts` is on b
  # row after    [a][d][c]      the row takes d, a copy of b, and gives up b
  """
  ledgers = verbs.each(ledger)
  s, lengths = ledgers[0].num_rows, ledgers[0].tables.lengths
  starts = arguments.integers("starts", starts, (s,))
  valid = (starts >= 0) & (starts <= lengths)
  asked = jnp.where(valid & (starts < lengths), starts, lengths)
  private = [_Private.of(one, asked) for one in ledgers]

  def turn(row, state):
    private, ok, waiting = state
    shared = [one.shared(row) for one in private]
    need = [jnp.sum(each, dtype=jnp.int32) for each in shared]
    missing = groups.any_of(each > one.pool.num_free for each, one in zip(need, private))
    some = groups.any_of(each > 0 for each in need)
    short = valid[row] & some & (waiting | missing)
    granted = valid[row] & ~short
    if not ledgers[0].copy_on_write:
      short, granted = jnp.bool_(False), granted & ~some
    private = [one.turn(row, each & granted) for one, each in zip(private, shared)]
    return private, ok.at[row].set(granted), waiting | short

  state = (private, valid, jnp.bool_(False))
  private, ok, _ = jax.lax.fori_loop(0, s, turn, state)
  made = [one.finish(before) for one, before in zip(private, ledgers)]
  ledger, info = verbs.reported(ledger, [one for one, _ in made], ok)
  return ledger, info, groups.like(ledger, [copies for _, copies in made])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Private:
  """A group whose rows get pages of their own one by one: which of them, and what is copied."""

  pool: Pool
  block_tables: jax.Array  # i32[S,P]
  first: jax.Array  # i32[S] first logical page to look at
  count: jax.Array  # i32[S] how many from there on
  first_copied: jax.Array  # i32[S] first logical page that was copied
  num_copied: jax.Array  # i32[S] pages from there to the last one copied, with those between
  chunk: int = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(cls, ledger: Ledger, starts: jax.Array) -> "_Private":
    """Before the first turn; rows want what they have from `starts` i32[S] on."""
    tables = ledger.tables
    wanted = jnp.where(starts < tables.lengths, tables.lengths, 0)
    starts = jnp.maximum(starts, tables.starts)
    first, count = tables_lib.span(starts, wanted, ledger.page_size)
    zeros = jnp.zeros(ledger.num_rows, jnp.int32)
    chunk = min(verbs.chunk(ledger), ledger.pages_per_row)
    return cls(ledger.pool, tables.block_tables, first, count, zeros, zeros, chunk)

  def shared(self, row: jax.Array) -> jax.Array:
    """Which logical pages of the row have other holders: bool[P]."""
    columns = jnp.arange(self.block_tables.shape[1], dtype=jnp.int32)
    inside = (columns >= self.first[row]) & (columns < self.first[row] + self.count[row])
    return inside & (pool_lib.refcounts(self.pool, self.block_tables[row]) > 1)

  def turn(self, row: jax.Array, shared: jax.Array) -> "_Private":
    """The row has pages of its own where it `shared` bool[P]."""
    table, n, width = self.block_tables[row], self.pool.num_pages, self.block_tables.shape[1]
    columns = jnp.arange(width, dtype=jnp.int32)
    ranks = jnp.cumsum(shared, dtype=jnp.int32) - 1
    pool, taken = pool_lib.take(
      self.pool,
      jnp.sum(shared, dtype=jnp.int32),
      lambda taken, ranks, pages: taken.at[ranks].set(pages, mode="drop"),
      jnp.full_like(table, n),
      chunk=self.chunk,
    )
    pool = pool_lib.release(pool, jnp.where(shared, table, n))
    table = jnp.where(shared, taken.at[ranks].get(mode="fill", fill_value=n), table)
    begin = jnp.min(jnp.where(shared, columns, width))
    end = jnp.max(jnp.where(shared, columns + 1, 0))
    return dataclasses.replace(
      self,
      pool=pool,
      block_tables=self.block_tables.at[row].set(table),
      first_copied=self.first_copied.at[row].set(begin),
      num_copied=self.num_copied.at[row].set(jnp.maximum(end - begin, 0)),
    )

  def finish(self, before: Ledger) -> tuple[Ledger, Copies]:
    """The ledger after all turns, and the pages to copy."""
    tables, begin, s = before.tables, self.first_copied, before.num_rows
    tail = tables_lib.num_pages_for(tables.lengths, before.page_size)
    renewed = (self.num_copied > 0) & (begin + self.num_copied == tail)
    columns = begin[:, None] + jnp.arange(before.pages_per_row, dtype=jnp.int32)[None, :]
    copies = Copies(
      sources=tables_lib.page_at(
        tables.block_tables, jnp.arange(s)[:, None], columns, before.pool.num_pages
      ),
      first=begin,
      num_pages=self.num_copied,
      lengths=tables.lengths,
    )
    tables = Tables(self.block_tables, tables.starts, tables.lengths, tables.stale & ~renewed)
    return dataclasses.replace(before, pool=self.pool, tables=tables), copies


def take_held(ledger: Ledgers, count: Any, size: Any) -> tuple[Ledgers, Any, Info]:
  """Takes `count` i32[] free pages of each group, which the host then holds, all or none.

  Returns:
    The next ledger, the pages i32[size] (N past the last) of each group, and `Info` with ok bool[].
  """
  ledgers, sizes = verbs.each(ledger), groups.values_for("size", size, ledger)
  counts = groups.values_for("count", count, ledger)
  counts = [arguments.integers("count", each, ()) for each in counts]
  ok = groups.all_of(
    (each >= 0) & (each <= jnp.minimum(limit, one.pool.num_free))
    for one, each, limit in zip(ledgers, counts, sizes)
  )
  made = [
    _take_held(one, jnp.where(ok, each, 0), limit)
    for one, each, limit in zip(ledgers, counts, sizes)
  ]
  ledger, info = verbs.reported(ledger, [one for one, _ in made], ok)
  return ledger, groups.like(ledger, [pages for _, pages in made]), info


def _take_held(ledger: Ledger, count: jax.Array, size: int) -> tuple[Ledger, jax.Array]:
  pool, pages = pool_lib.take(
    ledger.pool,
    count,
    lambda taken, ranks, pages: taken.at[ranks].set(pages, mode="drop"),
    jnp.full(size, ledger.pool.num_pages, jnp.int32),
    chunk=min(verbs.chunk(ledger), size),
  )
  return dataclasses.replace(ledger, pool=pool_lib.claim(pool, pages)), pages
