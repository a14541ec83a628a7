"""State of a paged KV cache, as immutable pytrees.

Axis letters, everywhere: N pages, T tokens per page, S rows, P pages per row, L layers, H KV
heads, Q query heads, D head dim, B tokens (or entries) in a call.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np


def _static():
  return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
  """Which pages are free, and how many holders each has.

  Invariant: bit `i` of `free` is set exactly when `refcount[i] == 0`, and `num_free` counts them.
  """

  free: jax.Array  # u32[ceil(N/32)] packed bitmap, bit set = free
  refcount: jax.Array  # i32[N] holders of each page, rows and host alike
  holds: jax.Array  # i32[N] the part of `refcount` that is the host's
  num_free: jax.Array  # i32[] pages without a holder
  cursor: jax.Array  # i32[] page where the next search for a free one starts

  @property
  def num_pages(self) -> int:
    """Pages in the pool, N; also the id that means "no page"."""
    return self.refcount.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
  """Which page holds which tokens of which row.

  Invariant: row r maps exactly the logical pages that hold a token of `starts[r]..lengths[r]`.
  """

  block_tables: jax.Array  # i32[S,P] page of each logical page, N = no page
  starts: jax.Array  # i32[S] first live token, 0 unless a window has passed it
  lengths: jax.Array  # i32[S] tokens held, counted from position 0
  stale: jax.Array  # bool[S] the tail page may hold another's tokens beyond the length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ledger:
  """All integers of a cache: who holds which page. Runs without any bytes, also on the host."""

  pool: Pool
  tables: Tables
  page_size: int = _static()
  copy_on_write: bool = _static()

  @property
  def num_rows(self) -> int:
    """Rows of the batch, S; also the id that means "no row"."""
    return self.tables.lengths.shape[0]

  @property
  def pages_per_row(self) -> int:
    """Pages that one row can map, P."""
    return self.tables.block_tables.shape[1]

  @property
  def capacity(self) -> int:
    """Tokens that one row can hold, P * T."""
    return self.pages_per_row * self.page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """The bytes: page-major, so one page with all its layers is one contiguous row.

  `dtype` is what the values mean, the array's own dtype how they are stored: the bits of a
  16-bit float may be kept as uint16 (see `CacheConfig.storage_dtype`).
  """

  kv: jax.Array  # storage[N,L,H,T,2D] keys in [..., :D], values in [..., D:]
  dtype: np.dtype = _static()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """A paged KV cache: one value; every verb returns the next one."""

  ledger: Ledger
  pages: Pages

  @property
  def block_tables(self) -> jax.Array:
    """i32[S,P] page of each logical page of each row, N where there is none."""
    return self.ledger.tables.block_tables

  @property
  def lengths(self) -> jax.Array:
    """i32[S] tokens held by each row."""
    return self.ledger.tables.lengths

  @property
  def num_free(self) -> jax.Array:
    """i32[] pages without a holder."""
    return self.ledger.pool.num_free


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Image:
  """One sequence's bytes, outside the cache. Made by `swap_out`, taken back by `swap_in`."""

  pages: Pages  # kv [B,L,H,T,2D], in logical order, zero past the last page
  start: jax.Array  # i32[] first live token
  length: jax.Array  # i32[] tokens, counted from position 0


class Info(NamedTuple):
  """What a verb reports. Padding and no-ops are ok."""

  ok: jax.Array  # bool, shaped like the request; a refused entry changed nothing
  num_free: jax.Array  # i32[] pages free afterwards


class Audit(NamedTuple):
  """How often laws 1 to 3 (see the README) are broken; all zero for a sound cache."""

  refcounts: jax.Array  # i32[] pages whose refcount is not table entries + holds (law 1)
  holds: jax.Array  # i32[] pages with fewer than 0, or more than refcount, holds (law 1)
  bitmap: jax.Array  # i32[] bits that disagree with refcount == 0 (law 2)
  num_free: jax.Array  # i32[] distance of `num_free` from the pages without a holder (law 2)
  tables: jax.Array  # i32[] table entries that should or should not be a page (law 3)
  rows: jax.Array  # i32[] rows whose start or length is out of range (law 3)
  cursor: jax.Array  # i32[] 1 if the cursor is no page


class Copies(NamedTuple):
  """Pages to make: row r's `num_pages[r]` logical pages from `first[r]` on, by its block table.

  The nth one keeps the tokens below `lengths[r]` from page `sources[r, nth]` (C columns, no page
  beyond them) and is zero elsewhere; it may be its own source.
  """

  sources: jax.Array  # i32[S,C]
  first: jax.Array  # i32[S]
  num_pages: jax.Array  # i32[S]
  lengths: jax.Array  # i32[S]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """One step's ragged batch, described once and used by every layer. Never part of a cache.

  Tokens that share a row are contiguous and ascending, and are attended in blocks of up to
  `block_size` tokens of one row:

      # tokens   0 1 2 3 4 5 6 7 8      rows     a a a a a b c c c
      # blocks   [0 1 2 3][4 - - -][5 - - -][6 7 8 -]
  """

  rows: jax.Array  # i32[B] row of each token, S = padding
  positions: jax.Array  # i32[B] position of each token in its row
  slots: jax.Array  # i32[B] page*T + offset; distinct ids >= N*T where the token has none
  ok: jax.Array  # bool[B] the token has a slot of its own, or is padding
  blocks: jax.Array  # i32[G] first token of each block of queries, B = no block
  block_lengths: jax.Array  # i32[G] tokens in each block, 0 = no block
  block_size: int = _static()
  implementation: str = _static()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Log:
  """The ledger verbs that a program ran, in order, so that another ledger can follow it.

  At each of K steps every one of `verbs` ran, with its operands of that step:

      # verbs     ("extend", "trim")
      # operands  ((i32[K,S],), (i32[K,S],))

  A step that did not happen has operands that ask for nothing.
  """

  operands: tuple[tuple[jax.Array, ...], ...]
  verbs: tuple[str, ...] = _static()
