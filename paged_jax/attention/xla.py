"""Paged attention in plain XLA, with memory that grows neither with the context nor with the pool.

Blocks of queries take their turns; spare ones cost nothing. Each walks its row's pages with an
online softmax, from the first that its window reaches to the last that causality allows, so a
ragged batch costs the pages that it sees:

    # pages    0 1 2 3 4 5 6 7 8 9 a b c d
    # chunks      [. . . .][. . . .][. . .]

A chunk of pages is one gather of (page, layer) pairs, small enough to stay in the processor's cache.
Several blocks at once (2 to 8, as one batch) took on CPU 0.8-1.2x the time for rows of one length
and up to 1.9x for others, measured 2026-11.

Letters as in types.py; M = queries of a block x query heads per KV head, C pages per chunk,
X = C*T positions of a chunk.
"""

import functools

import jax
import jax.numpy as jnp

from paged_jax import pages as pages_lib
from paged_jax.attention import backend, softmax
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Part, Tables

# A block computes the least of these numbers of tokens that holds its own: 1 for a row that
# decodes, 16 for one that verifies drafts. Measured 2026-11 on two cores: prompts of 100 tokens
# beside rows that decode take 0.65-0.9x the time that they take in blocks of 8, the average of
# these rows; without 32, the burst of `benchmarks/prefix.py`, whose prompts have 24 tokens of their
# own, takes 1.5x the time.
QUERIES = (1, 16, 32, 64)

# Most positions, and most bytes of K and V, in a chunk. Measured 2026-11 on two busy cores (AMD EPYC),
# beside chunks of 512 and then of 128 at a row's end: rows of 30 to 500 positions take 0.5-1.1x the
# processor time, of 2,048 and more 0.8-1.2x. One loop compiles in half the time of two.
CHUNK_TOKENS = 128
CHUNK_BYTES = 2**21

_NEVER = jnp.iinfo(jnp.int32).max


def block_size(num_tokens: int, num_rows: int, longest: int) -> int:
  """Most tokens of a row that are attended at once; a block costs no more than those that it has."""
  del num_rows
  return longest if longest <= backend.FEW else min(QUERIES[-1], num_tokens)


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  part: Part,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  largest = min(part.block_size, q.shape[0])
  # Sizes that are more than half of the largest are not worth a loop of their own.
  sizes = sorted({largest, *(size for size in QUERIES if size == 1 or 2 * size <= largest)})

  def attend_block(size, g, outs):
    return _attend_block(q, pages, layer, tables, part, options, size, g, outs)

  def attend_any(g, outs):
    """Block `g`, by the least size that holds it: each loop has one turn or none.

    A turn needs the loop's number, or XLA would take it out of the loop.
    """
    length = part.blocks.lengths[g]
    for smaller, size in zip([0, *sizes], sizes):
      mine = (length > smaller) & (length <= size)
      turn = functools.partial(attend_block, size)
      outs = jax.lax.fori_loop(g, g + mine.astype(jnp.int32), turn, outs)
    return outs

  one = attend_any if len(sizes) > 1 else functools.partial(attend_block, largest)
  out = jnp.zeros_like(pages_lib.cropped(q, pages))
  outs = (out, jnp.full_like(q[..., 0], -jnp.inf, jnp.float32))
  return jax.lax.fori_loop(0, part.blocks.num_blocks, one, outs)


def _attend_block(q, pages, layer, tables, part, options, size, g, outs):
  """`outs` with block `g`, of at most `size` tokens, attended."""
  n, _, h, t, _ = pages_lib.sizes(pages)
  b, num_heads, _ = q.shape
  chunk = _chunk(pages, tables)
  begin_token, length = part.blocks.first[g], part.blocks.lengths[g]
  at = jnp.minimum(begin_token, b - size)
  nth = at - begin_token + jnp.arange(size, dtype=jnp.int32)
  own = (nth >= 0) & (nth < length)

  def of_block(x):
    return jax.lax.dynamic_slice_in_dim(x, at, size, allow_negative_indices=False)

  last = jnp.where(own, of_block(part.last), -1)
  live = last >= 0
  first = jnp.maximum(part.blocks.starts[g], last - options.window + 1)
  begin, end = jnp.min(jnp.where(live, first, _NEVER)), jnp.max(last) + 1
  first, last = (jnp.repeat(x, num_heads // h)[:, None] for x in (first, last))
  queries = blocks_lib.by_head(of_block(q), h)
  row = jnp.minimum(part.blocks.rows[g], tables.lengths.shape[0] - 1)
  page = begin // t

  def add_chunk(number, sums):
    wanted = page + number * chunk
    column = jnp.minimum(wanted, tables.block_tables.shape[1] - chunk)  # the table ends there
    ids = jax.lax.dynamic_slice(
      tables.block_tables, (row, column), (1, chunk), allow_negative_indices=False
    )[0]
    j = column * t + jnp.arange(chunk * t, dtype=jnp.int32)
    there = (j >= jnp.maximum(begin, wanted * t)) & (j < end) & jnp.repeat(ids < n, t)
    seen = (j[None] >= first) & (j[None] <= last) & there[None]
    k, v, k_scales, v_scales = _load(pages, layer, ids, there)
    q, k, v = softmax.operands(queries, k, v)
    products = softmax.product(q, k)
    products = products if k_scales is None else products * k_scales
    logits = softmax.logits(products, seen[None], options.scale, options.softcap)
    return softmax.step(sums, logits, v, scales=v_scales)

  count = jax.lax.div(jnp.maximum(end - page * t, 0) + chunk * t - 1, chunk * t)
  start = blocks_lib.start(pages_lib.cropped(queries, pages), options.sinks)
  sums = jax.lax.fori_loop(0, count, add_chunk, start)

  def updated(out, new):
    new = blocks_lib.by_query(new, size).reshape(size, *out.shape[1:])
    mask = live.reshape(-1, *[1] * (out.ndim - 1))
    new = jnp.where(mask, new.astype(out.dtype), of_block(out))
    return jax.lax.dynamic_update_slice_in_dim(out, new, at, 0, allow_negative_indices=False)

  return tuple(updated(*pair) for pair in zip(outs, softmax.finish(sums)))


def _chunk(pages: Pages, tables: Tables) -> int:
  """Pages of a chunk."""
  fitting, max_pages = CHUNK_BYTES // pages_lib.layer_bytes(pages), tables.block_tables.shape[1]
  return max(1, min(CHUNK_TOKENS // pages.kv.shape[3], fitting, max_pages))


def _load(pages: Pages, layer: jax.Array, ids: jax.Array, live: jax.Array):
  """K and V [H,X,channels] of pages `ids` i32[C], and their scales f32[H,1,X], None of 16-bit pages.

  V, or its scale, is zero where not `live` bool[X].
  """
  n, num_layers, h, t, d = pages_lib.sizes(pages)
  kv = pages.kv.reshape(n * num_layers, h, t, -1)
  rows = jnp.minimum(ids, n - 1) * num_layers + layer
  by_head = jax.lax.GatherDimensionNumbers(
    offset_dims=(0, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 3)
  )

  def part(channel):
    where = jnp.stack([rows, jnp.full_like(rows, channel)], axis=-1)
    return jax.lax.gather(kv, where, by_head, (1, h, t, pages.head_dim), mode="clip")  # [H,C,T,..]

  k = part(0)
  v = part(d) if pages.value_dim is None else pages_lib.cropped(k, pages)
  v = jnp.where(live.reshape(-1, t, 1), v, jnp.zeros((), v.dtype))  # 0 * NaN is NaN
  k, v = (pages_lib.values(x.reshape(h, live.shape[0], -1), pages) for x in (k, v))
  if pages.scales is None:
    return k, v, None, None
  scales = pages.scales.reshape(n * num_layers, -1, t).at[rows].get(mode="clip")  # [C,2H,T]
  scales = (x.swapaxes(0, 1).reshape(h, 1, -1) for x in pages_lib.by_head(scales, pages))
  k_scales, v_scales = scales
  return k, v, k_scales, jnp.where(live, v_scales, 0.0)


BACKEND = Backend(attend, block_size=block_size, as_stored=False)
