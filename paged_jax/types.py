"""State of a paged KV cache, as immutable pytrees.

Axis letters, everywhere: N pages, T tokens per page, S rows, P pages per row, L layers, H KV
heads, Q query heads, D head dim, B tokens (or entries) in a call.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from paged_jax.meshes import Split


def _static(**fields):
  return dataclasses.field(metadata={"static": True}, **fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
  """Which pages are free, and how many holders each has.

  Invariant: bit `i` of `free` is set exactly when `refcount[i] == 0`, and `num_free` counts them.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> pj.init(config).ledger.pool.refcount.tolist()
  [0, 0, 0, 0, 0, 0, 0, 0]
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

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 3]))
  >>> cache.ledger.tables.block_tables[:, :3].tolist()  # 8 is "no page"
  [[0, 1, 8], [2, 8, 8]]
  """

  block_tables: jax.Array  # i32[S,P] page of each logical page, N = no page
  starts: jax.Array  # i32[S] first live token, 0 unless a window has passed it
  lengths: jax.Array  # i32[S] tokens held, counted from position 0
  stale: jax.Array  # bool[S] the tail page may hold another's tokens beyond the length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ledger:
  """All integers of a cache: who holds which page. It works without the bytes, also on the host.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> ledger = pj.jitted.ledger.init(config)
  >>> ledger.num_rows, ledger.pages_per_row, ledger.capacity
  (2, 4, 16)
  """

  pool: Pool
  tables: Tables
  page_size: int = _static()
  copy_on_write: bool = _static()
  window: int | None = _static()  # live tokens of a row that `extend` leaves, the next one included

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
  """The bytes: page-major, so a page with all its layers is one contiguous row.

  `dtype` and `head_dim` are those of the values. The array's own dtype and shape say how they are
  stored: the bits of a 16-bit float may be kept as uint16, and D may be more than `head_dim`, the
  rest zero (see `CacheConfig.storage_dtype` and `storage_head_dim`).

  With a `value_dim` pages hold keys only: kv is [N,L,H,T,D], and a token's value is the first
  `value_dim` channels of its key (see `CacheConfig.value_dim`).

  Pages of 8 bits have scales: rows 2h and 2h + 1 are those of the keys and of the values of KV head
  h, or row h is that of the keys that contain the values. Where pages go, their scales go, too.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> pj.init(config).pages.kv.shape
  (8, 1, 1, 4, 8)
  """

  kv: jax.Array  # storage[N,L,H,T,2D] keys in [..., :D], values in [..., D:]
  dtype: np.dtype = _static()
  head_dim: int = _static()
  value_dim: int | None = _static(default=None)
  scales: jax.Array | None = None  # f32[N,L,2H,T] of 8-bit pages, else None
  split: Split | None = _static(default=None)  # H over a mesh, each head kept `repeats` times


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """A paged KV cache: one value; every verb returns the next one.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 3]))
  >>> cache.lengths.tolist(), int(cache.num_free)
  ([6, 3], 5)
  """

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
  """The bytes of one row, outside the cache. `swap_out` makes it, `swap_in` takes it back.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> _, image, _ = pj.jitted.swap_out(cache, jnp.array(0))
  >>> int(image.length), image.pages.kv.shape
  (6, (4, 1, 1, 4, 8))
  """

  pages: Pages  # kv [B,L,H,T,2D], in logical order, zero past the last page
  start: jax.Array  # i32[] first live token
  length: jax.Array  # i32[] tokens, counted from position 0


class Info(NamedTuple):
  """What a verb reports. Padding and requests for nothing are ok.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> _, info = pj.jitted.extend(pj.init(config), jnp.array([6, -1]))
  >>> info.ok.tolist(), int(info.num_free)
  ([True, False], 6)
  """

  ok: jax.Array  # bool, shaped like the request; a refused entry changed nothing
  num_free: jax.Array  # i32[] pages free afterwards


class Audit(NamedTuple):
  """How often laws 1 to 3 (see the README) are broken: 0 if the cache is sound.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> int(pj.jitted.audit(pj.init(config)).refcounts)
  0
  """

  refcounts: jax.Array  # i32[] pages whose refcount is not table entries + holds (law 1)
  holds: jax.Array  # i32[] pages with fewer than 0, or more than refcount, holds (law 1)
  bitmap: jax.Array  # i32[] bits that disagree with refcount == 0 (law 2)
  num_free: jax.Array  # i32[] distance of `num_free` from the pages without a holder (law 2)
  tables: jax.Array  # i32[] table entries that should or should not be a page (law 3)
  rows: jax.Array  # i32[] rows whose start or length is out of range (law 3)
  cursor: jax.Array  # i32[] 1 if the cursor is no page
  lengths: jax.Array  # i32[] rows that are longer or shorter than in the first cache of a tuple


class Copies(NamedTuple):
  """Pages to make: of row r the `num_pages[r]` logical pages from `first[r]` on.

  The nth of them keeps the tokens below `lengths[r]` of page `sources[r, nth]` (C columns, no page
  beyond them) and is zero elsewhere. A page may be its own source.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> _, _, copies = pj.jitted.ledger.extend(pj.jitted.ledger.init(config), jnp.array([6, 0]))
  >>> copies.num_pages.tolist()
  [2, 0]
  """

  sources: jax.Array  # i32[S,C]
  first: jax.Array  # i32[S]
  num_pages: jax.Array  # i32[S]
  lengths: jax.Array  # i32[S]


class Blocks(NamedTuple):
  """The blocks of queries that attention takes one by one, live ones first; each is of one row.

      # tokens   0 1 2 3 4 5 6 7 8      rows     a a a a a b c c c
      # blocks   [0 1 2 3][4 - - -][5 - - -][6 7 8 -]

  A query sees the positions up to its `last`, from the row's first live token or the window's edge.
  """

  num_blocks: jax.Array  # i32[] live ones
  first: jax.Array  # i32[G] first token of each, B = no block
  lengths: jax.Array  # i32[G] tokens in each
  rows: jax.Array  # i32[G] S = no block
  starts: jax.Array  # i32[G] first live token of the row
  lows: jax.Array  # i32[G] least position among its tokens that attend, the largest int32 = none
  highs: jax.Array  # i32[G] greatest position, -1 = none
  tokens: jax.Array  # i32[G,X] token of each query, B = none
  last: jax.Array  # i32[G,X] its position, -1 = it attends to nothing
  places: jax.Array  # i32[B] where in the flat [G*X] each token's query is, G*X = nowhere


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
  """Where the TPU kernel writes tokens: runs of them, each in one window of a page.

  Tokens that skip a place of their window, or have a token without a slot between them, are two
  runs, one behind the other in these arrays:

      # slots    6 7 8 9 13 14      windows of 4 tokens     [4 . . 7][8 . . 11][12 . . 15]
      # runs     [6 7][8 9][13 14]
  """

  count: jax.Array  # i32[] runs
  shared: jax.Array  # bool[] two runs are in the same window
  first: jax.Array  # i32[B] first token of each run, B = no run
  lengths: jax.Array  # i32[B] tokens of each run, 0 = no run
  slots: jax.Array  # i32[B] slot of each run's first token, -1 = no run
  size: int = _static()  # W, tokens of a window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
  """Tokens of a batch that attention takes alike: those of rows that decode, or of prompts."""

  rows: jax.Array  # i32[B] row of each token, S = padding
  starts: jax.Array  # i32[B] first live token of its row
  last: jax.Array  # i32[B] position of each token, -1 = it attends to nothing
  blocks: Blocks
  windows: tuple[Windows, ...]  # of each kernel that writes; none: the backend writes by slots
  block_size: int = _static()  # X, most tokens in a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """The ragged batch of one step, described once and used by every layer. Never part of a cache.

  Tokens that share a row are contiguous and ascend. All that depends on the batch alone is here, so
  that layers repeat none of it.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> pj.jitted.plan(cache, jnp.array([0, 0]), jnp.array([4, 5])).slots.tolist()
  [4, 5]
  """

  rows: jax.Array  # i32[B] row of each token, S = padding
  positions: jax.Array  # i32[B] position of each token in its row
  slots: jax.Array  # i32[B] page*T + offset; distinct ids >= N*T where the token has none
  ok: jax.Array  # bool[B] the token has a slot of its own, or is padding
  parts: tuple[Part, ...]  # of the batch, in its order
  implementation: str = _static()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Log:
  """The ledger verbs that a program ran, in order, so that another ledger can follow it.

  At each of K steps all of `verbs` ran, with their operands of that step:

      # verbs     ("extend", "trim")
      # operands  ((i32[K,S],), (i32[K,S],))

  A step that did not happen has operands that ask for nothing.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> log = pj.Log(operands=((jnp.array([[6, 0], [1, 0]]),),), verbs=("extend",))
  >>> pj.jitted.ledger.replay(pj.jitted.ledger.init(config), log).tables.lengths.tolist()
  [7, 0]
  """

  operands: tuple[tuple[jax.Array, ...], ...]
  verbs: tuple[str, ...] = _static()
