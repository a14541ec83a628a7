"""Paged attention in plain XLA, with memory that grows neither with the context nor with the pool.

Blocks of queries take their turns; spare ones cost nothing. Each walks its row's pages with an
online softmax, from the first that its window reaches to the last that causality allows, so a
ragged batch costs the pages that it sees:

    # pages    0 1 2 3 4 5 6 7 8 9 a b c d
    # chunks  [. . . . . . . .][. .][. .][. .]    as many large ones as fit, then small ones

A chunk of pages is one gather of (page, layer) pairs, small enough to stay in the processor's cache.
Several blocks at once (2 to 8, as one batch) took on CPU 0.8-1.2x the time for rows of one length
and up to 1.9x for others, measured 2026-11.

Letters as in types.py; M = queries of a block x query heads per KV head, C pages per chunk,
X = C*T positions of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp

from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import softmax
from paged_jax.types import Pages, Plan, Tables

# A block computes the least of these numbers of tokens that holds its own: 1 for a row that
# decodes, 16 for one that verifies drafts. Measured 2026-11 on two cores: prompts of 100 tokens
# beside rows that decode take 0.65-0.9x the time that they take in blocks of 8, the average of
# these rows; without 32, the burst of `benchmarks/prefix.py`, whose prompts have 24 tokens of their
# own, takes 1.5x the time.
QUERIES = (1, 16, 32, 64)

# Most positions, and most bytes of K and V, in a chunk. Measured 2026-11 on an AMD EPYC (Zen 4, 1 MB
# L2 per core), jax 0.10.2 and 0.12.0: on one core half as much is as fast and twice is 1.1-1.4x
# slower; on two, from half to twice makes 0.9-1.2x, in no one direction.
CHUNK_TOKENS = 512
CHUNK_BYTES = 2**21

# Most positions in the chunks at a row's end. Rows of 20 to 110 positions take 0.3-0.45x the time
# that they take in large chunks alone.
LAST_CHUNK_TOKENS = 128


def refusal(pages: Pages) -> None:
  """Nothing: every cache is served."""
  del pages


def block_size(num_tokens: int, num_rows: int) -> int:
  """Most tokens of a row that are attended at once: more than one unless every row may decode."""
  return min(QUERIES[-1], num_tokens) if num_tokens > num_rows else 1


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  plan: Plan,
  *,
  scale: jax.Array,
  window: jax.Array,
  softcap: float | jax.Array | None,
  sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  n, num_layers, h, t, _ = pages_lib.sizes(pages)
  b, num_heads, _ = q.shape
  large, small = _chunks(pages, tables)
  dtype = pages.dtype if q.dtype == pages.dtype else jnp.float32  # of the operands of products

  def attend_block(m: int, g: jax.Array, outs: tuple[jax.Array, jax.Array]):
    """Block `g`, of at most `m` tokens, over its row."""
    at = jnp.minimum(plan.blocks[g], b - m)
    nth = at + jnp.arange(m, dtype=jnp.int32) - plan.blocks[g]

    def of_block(x):
      return jax.lax.dynamic_slice_in_dim(x, at, m)

    live = (nth >= 0) & (nth < plan.block_lengths[g]) & of_block(plan.ok)
    row = plan.rows.at[plan.blocks[g]].get(mode="clip")
    start = tables.starts.at[row].get(mode="clip")
    first, last = blocks_lib.seen(live, of_block(plan.positions), start, window)
    begin, end = jnp.min(first), jnp.max(last) + 1
    first, last = (jnp.repeat(x, num_heads // h)[:, None] for x in (first, last))
    queries = blocks_lib.by_head(of_block(q), h)

    def add_chunk(first_page, chunk, c, sums):
      """Adds the `c`-th `chunk` pages from the row's `first_page` i32[] on."""
      columns = first_page + c * chunk + jnp.arange(chunk, dtype=jnp.int32)
      ids = tables.block_tables.at[row, columns].get(mode="fill", fill_value=n)
      j = (columns[:, None] * t + jnp.arange(t, dtype=jnp.int32)[None]).reshape(-1)
      there = (j >= begin) & (j < end) & jnp.repeat(ids < n, t) & (layer < num_layers)
      k, v = _load(pages, layer, ids, there)
      logits = _dot("hmd,hxd->hmx", queries.astype(dtype), k.astype(dtype)) * scale
      if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
      seen = (j[None] >= first) & (j[None] <= last) & there[None]
      logits = jnp.where(seen[None], logits, -jnp.inf)
      return softmax.step(
        sums, logits, lambda p: _dot("hmx,hxd->hmd", p.astype(dtype), v.astype(dtype))
      )

    sums, page = blocks_lib.start(queries, sinks), begin // t
    if large > small:
      num_large = jnp.maximum(end - page * t + t - 1, 0) // t // large
      sums = jax.lax.fori_loop(0, num_large, functools.partial(add_chunk, page, large), sums)
      page += num_large * large
    num_small = -(-(end - page * t) // (small * t))
    sums = jax.lax.fori_loop(0, num_small, functools.partial(add_chunk, page, small), sums)

    def updated(out, new):
      new = blocks_lib.by_query(new, m).reshape(m, *out.shape[1:])
      mask = live.reshape(-1, *[1] * (out.ndim - 1))
      new = jnp.where(mask, new.astype(out.dtype), of_block(out))
      return jax.lax.dynamic_update_slice_in_dim(out, new, at, 0)

    return tuple(updated(*pair) for pair in zip(outs, softmax.finish(sums)))

  outs = (jnp.zeros_like(q), jnp.full_like(q[..., 0], -jnp.inf, jnp.float32))
  smaller = 0
  largest = min(plan.block_size, b)
  # Sizes that are more than half of the largest are not worth a loop of their own.
  for m in sorted({largest, *(size for size in QUERIES if size == 1 or 2 * size <= largest)}):
    mine = (plan.block_lengths > smaller) & (plan.block_lengths <= m)
    (blocks,) = jnp.nonzero(mine, size=len(mine), fill_value=0)
    outs = jax.lax.fori_loop(
      0, jnp.sum(mine), lambda i, outs, m=m, blocks=blocks: attend_block(m, blocks[i], outs), outs
    )
    smaller = m
  return outs


def _chunks(pages: Pages, tables: Tables) -> tuple[int, int]:
  """Pages of a large chunk and of a small one."""
  page_bytes = math.prod(pages.kv.shape[2:]) * pages.kv.dtype.itemsize
  page_size, max_pages = pages.kv.shape[3], tables.block_tables.shape[1]
  wanted = min(CHUNK_TOKENS // page_size, CHUNK_BYTES // page_bytes, max_pages)
  large = max(1, wanted)
  return large, max(1, min(LAST_CHUNK_TOKENS // page_size, large))


def _load(
  pages: Pages, layer: jax.Array, ids: jax.Array, live: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """K and V [H,X,D] of pages `ids` i32[C]. V is zero where not `live` bool[X]: 0 * NaN is NaN."""
  _, _, h, t, d = pages_lib.sizes(pages)
  ids, live = jax.lax.optimization_barrier((ids, live))  # once, not for every element of K and V
  bits = pages.kv.at[ids, layer].get(mode="clip")  # [C,H,T,2D]
  k, v = bits[..., :d], bits[..., d:]
  v = jnp.where(live.reshape(-1, 1, t, 1), v, jnp.zeros((), v.dtype))
  k, v = (pages_lib.values(x.swapaxes(0, 1).reshape(h, -1, d), pages) for x in (k, v))
  return k, v


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  precision = "highest" if b.dtype == jnp.float32 else None  # a GPU would take TF32
  return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
