"""The verbs: `(cache, request) -> (cache, info)`, pure functions on one immutable pytree.

Axis letters: N pages, T tokens per page, S rows, P pages per row, L layers, H KV heads, Q query
heads, D head dim, B tokens or entries in a call. Ids and lengths are always i32 arrays; "no page"
is N and "no row" is S, and both pad a request. Wrong ranks, shapes and dtypes raise `ValueError`
while tracing; whatever the data asks is answered in `Info`, and what is refused changes nothing.

    # tokens  0 ........ 48 ...... 53
    # pages   [a][b][c]  [d......]      a-c shared with the parent of a fork, d is the row's own
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from paged_jax import arguments, attention
from paged_jax import ledger as ledger_lib
from paged_jax import pages as pages_lib
from paged_jax.config import CacheConfig
from paged_jax.ledger import pool as pool_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.types import Audit, Cache, Copies, Image, Info, Ledger, Pages, Plan


def init(config: CacheConfig) -> Cache:
  """An empty cache: all pages free, all rows empty, all bytes zero.

  >>> import jax.numpy as jnp, paged_jax
  >>> config = paged_jax.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=8,
  ...                                num_rows=2, max_length=64)
  >>> int(paged_jax.init(config).num_free)
  8
  """
  return Cache(ledger=ledger_lib.init(config), pages=pages_lib.init(config))


def pages_needed(cache: Cache, num_tokens: jax.Array) -> jax.Array:
  """Pages that `extend` with these `num_tokens` i32[S] takes for each row, i32[S].

  The copy of a shared tail page is counted, whether pages are free is not; a row whose request
  `extend` would refuse for another reason needs none.
  """
  return ledger_lib.pages_needed(cache.ledger, num_tokens)


def extend(cache: Cache, num_tokens: jax.Array) -> tuple[Cache, Info]:
  """Makes room for `num_tokens` i32[S] more tokens in each row, which read zero until written.

  A partly filled tail page that others hold too is copied first (copy on write), so a row may
  write whatever it was granted. The result is that of extending row by row in order: of n rows
  that share a tail page the last one keeps it.

  Returns:
    The next cache, and `Info` with ok bool[S]. A negative count, or more tokens than a row can
    hold, refuses that row alone. Once a row is refused for want of pages, each later row that
    needs a page is refused too, so an early row is never overtaken.
  """
  ledger, info, copies = ledger_lib.extend(cache.ledger, num_tokens)
  return _renew(cache, ledger, copies), info


def plan(
  cache: Cache, rows: jax.Array, positions: jax.Array, *, implementation: str | None = None
) -> Plan:
  """Describes one step's ragged batch of tokens, once for all layers.

  Args:
    cache: The cache; any later verb that changes its tables or refcounts invalidates the plan.
    rows: i32[B] row of each token. A row's tokens are contiguous and ascending; S is padding.
    positions: i32[B] position of each token in its row, below the row's length.
    implementation: Attention backend: "reference", "xla", "tpu", "gpu" or "hopper"; None takes the
      best that the platform has for this cache. One asked for by name is never replaced by another.

  Returns:
    The plan. `plan.ok` is False for a token without a slot of its own: unmapped, beyond the
    length, on a page that others hold; and for one that breaks the order: from where a row's
    positions stop ascending, and in every later piece of a row that comes in several. Such a
    token is not written and attends to nothing.
  """
  rows = arguments.integers("rows", rows, (None,))
  positions = arguments.integers("positions", positions, rows.shape)
  s, n, size = cache.ledger.num_rows, cache.ledger.pool.num_pages, cache.ledger.page_size
  known = jnp.where((rows >= 0) & (rows < s), rows, s)
  ordered, faults, slots = _placed(cache.ledger, known, positions)
  own = (faults == 0) & (known < s)
  nowhere = n * size + jnp.arange(rows.shape[0], dtype=jnp.int32)
  implementation = attention.choose(implementation, cache.pages)
  block_size = attention.block_size(implementation, rows.shape[0], s)
  blocks, block_lengths = attention.schedule(jnp.where(ordered, known, s), s, block_size)
  return Plan(
    rows=known,
    positions=positions,
    slots=jnp.where(own, slots, nowhere),
    ok=own | (rows == s),
    blocks=blocks,
    block_lengths=block_lengths,
    block_size=block_size,
    implementation=implementation,
  )


def check_plan(cache: Cache, plan: Plan) -> None:
  """Raises if a token of the plan has no slot of its own, and says why of the first ten.

  For finding mistakes: such tokens are not written and attend to nothing (`plan.ok`). It reads the
  plan eagerly; inside a program it is a check of `jax.experimental.checkify`, which the program must
  be wrapped in.

  >>> import jax.numpy as jnp, paged_jax
  >>> config = paged_jax.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=8,
  ...                                num_rows=2, max_length=64)
  >>> cache, _ = paged_jax.extend(paged_jax.init(config), jnp.array([3, 0]))
  >>> paged_jax.check_plan(cache, paged_jax.plan(cache, jnp.array([0, 0]), jnp.array([2, 3])))
  Traceback (most recent call last):
  ...
  ValueError: 1 of 2 tokens have no slot: token 1 (row 0, position 3) is beyond its row's length

  Raises:
    ValueError: Eagerly, that.
  """
  _check_call("check_plan(cache, plan)", cache, plan)
  _, faults, slots = _placed(cache.ledger, plan.rows, plan.positions)
  moved = (plan.slots != slots) & (plan.rows < cache.ledger.num_rows)
  faults = jnp.where((faults == 0) & moved, _MOVED, faults)
  faults = jnp.where((faults == 0) & ~plan.ok, _NO_ROW, faults)
  (first,) = jnp.nonzero(faults, size=min(10, len(faults)), fill_value=len(faults))
  first = first.astype(jnp.int32)
  shown = (x.at[first].get(mode="fill", fill_value=-1) for x in (plan.rows, plan.positions, faults))
  rows, positions, why = shown
  if isinstance(faults, jax.core.Tracer):
    legend = ", ".join(f"{number} {fault}" for number, fault in enumerate(_FAULTS, start=1))
    message = "tokens {first} (rows {rows}, positions {positions}) have no slot, because of {why}: "
    checkify.check(
      jnp.all(faults == 0), message + legend, first=first, rows=rows, positions=positions, why=why
    )
  elif count := int(jnp.sum(faults != 0)):
    each = zip(*(x[:count].tolist() for x in (first, rows, positions, why)))
    reasons = [f"token {i} (row {row}, position {p}) {_FAULTS[x - 1]}" for i, row, p, x in each]
    raise ValueError(f"{count} of {len(faults)} tokens have no slot: {', '.join(reasons)}")


def write(cache: Cache, layer: int | jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> Cache:
  """Writes keys and values [B,H,D] of the plan's tokens in one layer; cast to the cache's dtype.

  Tokens without a slot are dropped. The write is in place when the cache is donated or carried
  by a loop; read the cache that is returned, never the one that was passed. It has gradients, unless
  the cache keeps 16-bit values as bits (see `CacheConfig.storage_dtype`).

  A traced `layer` that is out of range writes NaN into the last one, so that it does not pass for
  zeros.
  """
  _check_call("write(cache, layer, k, v, plan)", cache, plan)
  _, num_layers, h, _, d = pages_lib.sizes(cache.pages)
  shape = (plan.rows.shape[0], h, d)
  k, v = arguments.floats("k", k, shape), arguments.floats("v", v, shape)
  index = arguments.layer(layer, num_layers)
  k, v = (_poisoned(x, layer, index, num_layers) for x in (k, v))
  index = jnp.minimum(index, num_layers - 1)
  return dataclasses.replace(cache, pages=attention.write(cache.pages, index, k, v, plan))


def attend(
  cache: Cache,
  layer: int | jax.Array,
  q: jax.Array,
  plan: Plan,
  *,
  scale: float | jax.Array | None = None,
  window: int | jax.Array | None = None,
  softcap: float | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Paged attention (Kwon et al. 2023, §4.3) of the plan's tokens over their rows' past.

  Prefill, chunked prefill, decode and verification are this one call: the token at position i
  sees its row's live tokens up to i.

  Args:
    cache: The cache, this step's keys and values already written.
    layer: Which layer, a Python int or i32[].
    q: [B,Q,D] queries; Q is a multiple of H, and H groups of query heads share a KV head.
    plan: What `plan` returned for this step.
    scale: Factor of the logits, D**-0.5 by default.
    window: Tokens that a query sees, itself included; the largest int32 means all.
    softcap: Logits become softcap * tanh(logits / softcap).
    sinks: f32[Q] a logit per head that takes part in the softmax and carries no value.
    return_lse: Also return the log of each softmax denominator, sinks included.

  Returns:
    [B,Q,D] in q's dtype, and f32[B,Q] if `return_lse`. Padding and tokens that are not ok give 0
    and -inf. Logits and sums are float32. Live keys and values must be finite: one that is not
    may reach other tokens of its row, never another row's. A traced `layer` that is out of range
    gives NaN.

  Gradients are those of the "reference" implementation, whichever computes the values; they take
  its time and memory, of every token's whole row.
  """
  _check_call("attend(cache, layer, q, plan)", cache, plan)
  num_layers = cache.pages.kv.shape[1]
  index = arguments.layer(layer, num_layers)
  out, lse = attention.attend(
    q, cache.pages, index, cache.ledger.tables, plan,
    scale=scale, window=window, softcap=softcap, sinks=sinks,
  )  # fmt: skip
  out, lse = (_poisoned(x, layer, index, num_layers) for x in (out, lse))
  return (out, lse) if return_lse else out


def gather(
  cache: Cache, layer: int | jax.Array, rows: jax.Array, *, num_tokens: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Keys and values of `rows` i32[R] in token order: two arrays [R,C,H,D].

  Zero where a row has no live token, whatever its pages contain. C is `num_tokens`, or a row's
  capacity. A traced `layer` that is out of range gives NaN.
  """
  rows = arguments.integers("rows", rows, (None,))
  num_layers = cache.pages.kv.shape[1]
  index = arguments.layer(layer, num_layers)
  ledger = cache.ledger
  size = ledger.capacity
  if num_tokens is not None:
    size = arguments.size("num_tokens", num_tokens, ledger.capacity)
  known = jnp.where((rows >= 0) & (rows < ledger.num_rows), rows, ledger.num_rows)
  columns = jnp.arange(-(-size // ledger.page_size), dtype=jnp.int32)
  tables = tables_lib.page_at(
    ledger.tables.block_tables, known[:, None], columns[None, :], ledger.pool.num_pages
  )
  k, v = pages_lib.gather(cache.pages, index, tables)
  positions = jnp.arange(size, dtype=jnp.int32)[None, :]
  starts = ledger.tables.starts.at[known].get(mode="fill", fill_value=0)[:, None]
  lengths = ledger.tables.lengths.at[known].get(mode="fill", fill_value=0)[:, None]
  live = ((positions >= starts) & (positions < lengths))[..., None, None]
  zero = jnp.zeros((), k.dtype)
  k, v = (jnp.where(live, x[:, :size], zero) for x in (k, v))
  return _poisoned(k, layer, index, num_layers), _poisoned(v, layer, index, num_layers)


def fork(
  cache: Cache, src: jax.Array, dst: jax.Array, num_tokens: jax.Array | None = None
) -> tuple[Cache, Info]:
  """Empty rows `dst` i32[B] come to share the first tokens of rows `src` i32[B]. No bytes move.

  `num_tokens` i32[B] is all of them by default. Every entry reads the state before the call. An
  entry is refused if `src` is no row, `dst` is busy or was named before, or the source does not
  hold that many tokens; with `copy_on_write` off, also if it would share part of a page.
  """
  return _with_ledger(cache, *ledger_lib.fork(cache.ledger, src, dst, num_tokens))


def reorder(cache: Cache, sources: jax.Array) -> tuple[Cache, Info]:
  """Row r becomes a share of row `sources[r]`, all rows at once; S empties it. i32[S].

  A step of beam search is `reorder`, then `extend`. Needs no pages. A source that is no row is
  refused and its row keeps what it has; with `copy_on_write` off, so is one that ends inside a
  page.
  """
  return _with_ledger(cache, *ledger_lib.reorder(cache.ledger, sources))


def unshare(cache: Cache, starts: jax.Array) -> tuple[Cache, Info]:
  """Copies what rows share from token `starts` i32[S] on, so that those tokens may be rewritten.

  Row by row in order, like `extend`; a start at a row's length asks for nothing, one outside
  0..length is refused.
  """
  ledger, info, copies = ledger_lib.unshare(cache.ledger, starts)
  return _renew(cache, ledger, copies), info


def trim(cache: Cache, lengths: jax.Array) -> tuple[Cache, Info]:
  """Each row keeps its first `lengths` i32[S] tokens, and releases whole pages behind them.

  Refused if above the row's length, negative, or inside what a window has already passed; 0
  empties the row.
  """
  return _with_ledger(cache, *ledger_lib.trim(cache.ledger, lengths))


def slide(cache: Cache, starts: jax.Array) -> tuple[Cache, Info]:
  """Each row forgets its tokens before `starts` i32[S], and releases whole pages before them.

  Positions do not change. A start already passed is a no-op; one above the length or negative is
  refused.
  """
  return _with_ledger(cache, *ledger_lib.slide(cache.ledger, starts))


def free(cache: Cache, rows: jax.Array) -> tuple[Cache, Info]:
  """Rows marked in `rows` bool[S] release everything. Freeing an empty row is refused."""
  return _with_ledger(cache, *ledger_lib.free(cache.ledger, rows))


def hold(cache: Cache, pages: jax.Array) -> tuple[Cache, Info]:
  """Adds a host reference to each of `pages` i32[B]; a free or unknown page is refused."""
  return _with_ledger(cache, *ledger_lib.hold(cache.ledger, pages))


def drop(cache: Cache, pages: jax.Array) -> tuple[Cache, Info]:
  """Takes a host reference back from each of `pages` i32[B]; one too many is refused."""
  return _with_ledger(cache, *ledger_lib.drop(cache.ledger, pages))


def adopt(
  cache: Cache,
  rows: jax.Array,
  pages: jax.Array,
  lengths: jax.Array,
  starts: jax.Array | None = None,
) -> tuple[Cache, Info]:
  """Empty rows start life on pages that the host holds (a prefix hit). The holds remain.

  Args:
    cache: The cache.
    rows: i32[B] distinct empty rows; S pads.
    pages: i32[B,C] the held pages of each row in order; those past its last one are ignored.
    lengths: i32[B] tokens of each row, counted from position 0.
    starts: i32[B] first live token, 0 by default; `pages` begins with the page that holds it.
  """
  return _with_ledger(cache, *ledger_lib.adopt(cache.ledger, rows, pages, lengths, starts))


def read_pages(cache: Cache, pages: jax.Array) -> Pages:
  """The bytes of `pages` i32[B], kv [B,L,H,T,2D]; zero where there is no such page."""
  pages = arguments.integers("pages", pages, (None,))
  n = cache.ledger.pool.num_pages
  return pages_lib.read(cache.pages, jnp.where(pages >= 0, pages, n))


def put_pages(cache: Cache, image: Pages, count: jax.Array) -> tuple[Cache, jax.Array, Info]:
  """The first `count` i32[] pages of `image` go into fresh pages that the host holds.

  Returns:
    The next cache, the pages i32[B] (N past `count`, or everywhere if refused), and `Info` with
    ok bool[]: all or nothing.
  """
  shape = (max(1, image.kv.shape[0]), *cache.pages.kv.shape[1:])
  _check_image("image", image, cache.pages, shape)
  ledger, pages, info = ledger_lib.take_held(cache.ledger, count, image.kv.shape[0])
  bytes_ = pages_lib.put(cache.pages, pages, image)
  return Cache(ledger=ledger, pages=bytes_), pages, info


def offload(cache: Cache, pages: jax.Array) -> tuple[Pages, ...]:
  """The bytes of each of `pages` i32[B], in host memory: B images, kv [L,H,T,2D].

  Zero where there is no such page. One image per page, so that each can be kept, shared and
  forgotten alone. Inside `jit` (and so in `jitted`) the host memory is pinned where the backend
  has such; the copies do not wait for each other.
  """
  pages = arguments.integers("pages", pages, (None,))
  n = cache.ledger.pool.num_pages
  known = jnp.where(pages >= 0, pages, n)
  images = (pages_lib.read_one(cache.pages, known[i]) for i in range(pages.shape[0]))
  return tuple(jax.device_put(image, jax.memory.Space.Host) for image in images)


def restore(
  cache: Cache, images: Sequence[Pages], count: jax.Array
) -> tuple[Cache, jax.Array, Info]:
  """The first `count` i32[] of what `offload` took go into fresh pages that the host holds.

  Returns:
    The next cache, the pages i32[B] (N past `count`, or everywhere if refused), and `Info` with
    ok bool[]: all or nothing.
  """
  if not images:
    raise ValueError("images must have at least one page, got none")
  for i, image in enumerate(images):
    _check_image(f"images[{i}]", image, cache.pages, cache.pages.kv.shape[1:])
  ledger, pages, info = ledger_lib.take_held(cache.ledger, count, len(images))
  bytes_ = cache.pages
  for i, image in enumerate(images):
    image = jax.device_put(image, jax.memory.Space.Device)
    bytes_ = pages_lib.put_one(bytes_, pages[i], image)
  return Cache(ledger=ledger, pages=bytes_), pages, info


def scrub(cache: Cache, pages: jax.Array) -> Cache:
  """Clears those of `pages` i32[B] that nobody holds. Only for secrecy: no verb shows stale bytes."""
  pages = arguments.integers("pages", pages, (None,))
  n = cache.ledger.pool.num_pages
  known = jnp.where((pages >= 0) & (pages < n), pages, n)
  idle = pool_lib.refcounts(cache.ledger.pool, known) == 0
  bytes_ = pages_lib.clear(cache.pages, jnp.where(idle, known, n))
  return dataclasses.replace(cache, pages=bytes_)


def _check_image(name: str, image: Pages, pages: Pages, shape: tuple[int, ...]) -> None:
  """Raises unless `image` is as wide, and of the same dtypes, as `pages`."""
  wanted = jax.ShapeDtypeStruct(shape, pages.kv.dtype)
  got = jax.ShapeDtypeStruct(image.kv.shape, image.kv.dtype)
  if got != wanted or image.dtype != pages.dtype:
    raise ValueError(f"{name} must be {wanted} of {pages.dtype}, got {got} of {image.dtype}")


def swap_out(
  cache: Cache, row: jax.Array, *, num_pages: int | None = None
) -> tuple[Cache, Image, Info]:
  """Takes the bytes of one row i32[] out of the cache and frees it.

  Args:
    cache: The cache.
    row: i32[] the row; an unknown or empty one is refused, and its image is empty.
    num_pages: Size of the image, static; all that a row can map by default. A row that maps more
      is refused.
  """
  row = arguments.integers("row", row, ())
  ledger = cache.ledger
  bucket = ledger.pages_per_row
  if num_pages is not None:
    bucket = arguments.size("num_pages", num_pages, ledger.pages_per_row)
  mask = jnp.arange(ledger.num_rows, dtype=jnp.int32) == row
  start = jnp.sum(jnp.where(mask, ledger.tables.starts, 0), dtype=jnp.int32)
  length = jnp.sum(jnp.where(mask, ledger.tables.lengths, 0), dtype=jnp.int32)
  first, count = tables_lib.span(start, length, ledger.page_size)
  ok = (length > 0) & (count <= bucket)
  columns = first + jnp.arange(bucket, dtype=jnp.int32)
  known = jnp.where(ok, row, ledger.num_rows)
  pages = tables_lib.page_at(ledger.tables.block_tables, known, columns, ledger.pool.num_pages)
  start, length = jnp.where(ok, start, 0), jnp.where(ok, length, 0)
  image = pages_lib.read(cache.pages, pages)
  image = pages_lib.only(image, start - first * ledger.page_size, length - first * ledger.page_size)
  cache, info = free(cache, mask & ok)
  return cache, Image(image, start, length), info._replace(ok=ok)


def swap_in(cache: Cache, row: jax.Array, image: Image) -> tuple[Cache, Info]:
  """Puts what `swap_out` took into fresh pages of the empty row i32[]; all or nothing."""
  row = arguments.integers("row", row, ())
  start = arguments.integers("image.start", image.start, ())
  length = arguments.integers("image.length", image.length, ())
  s = cache.ledger.num_rows
  _, count = tables_lib.span(start, length, cache.ledger.page_size)
  vacant = cache.lengths.at[jnp.where(row >= 0, row, s)].get(mode="fill", fill_value=1) == 0
  sane = (start >= 0) & (start <= length) & (length <= cache.ledger.capacity)
  cache, pages, info = put_pages(cache, image.pages, jnp.where(vacant & sane, count, -1))
  # The holds go at once, so that no page stays shared and `copy_on_write` does not matter.
  ledger = dataclasses.replace(cache.ledger, copy_on_write=True)
  ledger, _ = ledger_lib.adopt(
    ledger, row[None], pages[None], jnp.where(info.ok, length, 0)[None], start[None]
  )
  ledger, _ = ledger_lib.drop(ledger, pages)
  ledger = dataclasses.replace(ledger, copy_on_write=cache.ledger.copy_on_write)
  return _with_ledger(cache, ledger, info._replace(num_free=ledger.pool.num_free))


def audit(cache: Cache) -> Audit:
  """How often the laws of refcounts, bitmap and tables are broken; all zero for a sound cache."""
  return ledger_lib.audit(cache.ledger)


_FAULTS = (  # why a token has no slot of its own
  "is in an empty row, which nobody has extended",
  "is beyond its row's length",
  "is before the first live token of its row",
  "does not ascend in its row, or its row comes in several pieces",
  "is on a page that others hold, too",
  "is not where the plan says: the cache has changed since",
  "is in no row of this cache",
)
_MOVED, _NO_ROW = len(_FAULTS) - 1, len(_FAULTS)


def _placed(
  ledger: Ledger, rows: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where tokens go: whether each is in order, bool[B]; why it has no slot of its own, as a number of
  `_FAULTS` from 1 on, 0 if it has, i32[B]; and its slot, i32[B]."""
  tables, pool, size = ledger.tables, ledger.pool, ledger.page_size
  lengths = tables.lengths.at[rows].get(mode="fill", fill_value=0)
  starts = tables.starts.at[rows].get(mode="fill", fill_value=0)
  page = tables_lib.page_at(tables.block_tables, rows, positions // size, pool.num_pages)
  ordered = _ordered(rows, positions, ledger.num_rows)
  found = [
    lengths == 0, positions >= lengths, positions < starts, ~ordered,
    pool_lib.refcounts(pool, page) != 1,
  ]  # fmt: skip
  faults = jnp.select(found, [jnp.int32(i) for i in range(1, 1 + len(found))], jnp.int32(0))
  faults = jnp.where(rows == ledger.num_rows, 0, faults)
  return ordered, faults, page * size + positions % size


def _poisoned(x: jax.Array, layer: int | jax.Array, index: jax.Array, num_layers: int) -> jax.Array:
  """`x`, or NaN if a traced `layer` is out of range, as its `index` says."""
  if isinstance(layer, int | np.integer):
    return x
  return jnp.where(index < num_layers, x, jnp.full((), jnp.nan, x.dtype))


def _check_call(call: str, cache: Cache, plan: Plan) -> None:
  """Raises unless `cache` and `plan` are where they should be."""
  for name, value, kind in (("cache", cache, Cache), ("plan", plan, Plan)):
    if not isinstance(value, kind):
      raise ValueError(f"{name} must be a {kind.__name__} in {call}, got {type(value).__name__}")


def _ordered(rows: jax.Array, positions: jax.Array, num_rows: int) -> jax.Array:
  """Which tokens i32[B] belong to the first piece of their row, where it still ascends: bool[B]."""
  tokens = jnp.arange(rows.shape[0], dtype=jnp.int32)
  fresh = jnp.pad(rows[1:] != rows[:-1], (1, 0), constant_values=True)
  begin = jax.lax.cummax(jnp.where(fresh, tokens, 0))
  first = jnp.full(num_rows, rows.shape[0], jnp.int32).at[rows].min(tokens, mode="drop")
  falls = ~fresh & jnp.pad(positions[1:] <= positions[:-1], (1, 0))
  fallen = jnp.cumsum(falls, dtype=jnp.int32)
  return (first.at[rows].get(mode="fill", fill_value=0) == begin) & (fallen == fallen[begin])


def _with_ledger(cache: Cache, ledger: Ledger, info: Info) -> tuple[Cache, Info]:
  return dataclasses.replace(cache, ledger=ledger), info


def _renew(cache: Cache, ledger: Ledger, copies: Copies) -> Cache:
  pages = pages_lib.renew(cache.pages, ledger.tables.block_tables, copies)
  return Cache(ledger=ledger, pages=pages)
