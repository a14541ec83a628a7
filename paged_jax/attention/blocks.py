"""A plan's blocks of queries, heads that share a KV head side by side.

Letters as in types.py; G blocks, M = queries of a block x query heads per KV head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from paged_jax.attention import softmax
from paged_jax.types import Plan, Tables

_NEVER = jnp.iinfo(jnp.int32).max


class Blocks(NamedTuple):
  """The blocks of queries, and the positions first..last that each query sees."""

  queries: jax.Array  # [G,H,M,D]
  rows: jax.Array  # i32[G] S where there is no block
  first: jax.Array  # i32[G,M]
  last: jax.Array  # i32[G,M] -1 where the query sees nothing
  tokens: jax.Array  # i32[G,Qb] token of each query, B where there is none


def make(q: jax.Array, h: int, tables: Tables, plan: Plan, window: jax.Array) -> Blocks:
  """The plan's blocks with their queries q [B,Q,D]."""
  b, num_heads, _ = q.shape
  nth = jnp.arange(plan.block_size, dtype=jnp.int32)[None]
  tokens = plan.blocks[:, None] + nth
  live = (nth < plan.block_lengths[:, None]) & _take(plan.ok, tokens, False)
  rows = _take(plan.rows, plan.blocks, tables.lengths.shape[0])
  start = _take(tables.starts, rows, 0)[:, None]
  first, last = seen(live, _take(plan.positions, tokens, -1), start, window)
  tokens = jnp.where(live, tokens, b)
  return Blocks(
    queries=by_head(_take(q, tokens, 0), h),
    rows=rows,
    first=jnp.repeat(first, num_heads // h, axis=1),
    last=jnp.repeat(last, num_heads // h, axis=1),
    tokens=tokens,
  )


def seen(
  live: jax.Array, positions: jax.Array, start: jax.Array, window: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The positions first..last that tokens see, none where they are not `live`."""
  last = jnp.where(live, positions, -1)
  return jnp.where(live, jnp.maximum(start, last - window + 1), _NEVER), last


def by_head(x: jax.Array, h: int) -> jax.Array:
  """[...,B,Q,D] as [...,H,M,D]."""
  *batch, b, num_heads, d = x.shape
  x = x.reshape(*batch, b, h, num_heads // h, d).swapaxes(-4, -3)
  return x.reshape(*batch, h, -1, d)


def by_query(x: jax.Array, b: int) -> jax.Array:
  """[...,H,M,D] as [...,B,Q,D]: what `by_head` was given."""
  *batch, h, m, d = x.shape
  x = x.reshape(*batch, h, b, m // b, d).swapaxes(-4, -3)
  return x.reshape(*batch, b, -1, d)


def start(queries: jax.Array, sinks: jax.Array | None) -> softmax.Sums:
  """Sums over nothing, or over the sinks alone, for queries [H,M,D]."""
  h, m, _ = queries.shape
  acc = jnp.zeros_like(queries, jnp.float32)
  zero = acc[..., :1]
  if sinks is None:
    return softmax.Sums(zero - jnp.inf, zero, acc)
  by_head = sinks.reshape(h, -1)
  tops = jnp.tile(by_head, (1, m // by_head.shape[1]))
  return softmax.Sums(zero + tops[..., None], zero + 1, acc)


def by_token(
  q: jax.Array, blocks: Blocks, out: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Blocks' outputs [G,H,M,D] and LSE [G,H,M,1] as those of the tokens of q [B,Q,D]."""
  out, lse = (by_query(x, blocks.tokens.shape[1]) for x in (out, lse))
  lse = lse[..., 0]
  return (
    jnp.zeros_like(q).at[blocks.tokens].set(out.astype(q.dtype), mode="drop"),
    jnp.full_like(q[..., 0], -jnp.inf, jnp.float32).at[blocks.tokens].set(lse, mode="drop"),
  )


def _take(x: jax.Array, ids, missing) -> jax.Array:
  return x.at[ids].get(mode="fill", fill_value=missing)
