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
  b, num_heads, d = q.shape
  nth = jnp.arange(plan.block_size, dtype=jnp.int32)[None]
  tokens = plan.blocks[:, None] + nth
  live = (nth < plan.block_lengths[:, None]) & _take(plan.ok, tokens, False)
  tokens = jnp.where(live, tokens, b)
  rows = _take(plan.rows, plan.blocks, tables.lengths.shape[0])
  last = _take(plan.positions, tokens, -1)
  first = jnp.maximum(_take(tables.starts, rows, 0)[:, None], last - window + 1)
  queries = _take(q, tokens, 0).reshape(*tokens.shape, h, -1, d).swapaxes(1, 2)
  repeats = num_heads // h
  return Blocks(
    queries=queries.reshape(tokens.shape[0], h, -1, d),
    rows=rows,
    first=jnp.repeat(jnp.where(live, first, _NEVER), repeats, axis=1),
    last=jnp.repeat(last, repeats, axis=1),
    tokens=tokens,
  )


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

  def tokens(x):
    g, h, _, d = x.shape
    x = x.reshape(g, h, blocks.tokens.shape[1], -1, d).swapaxes(1, 2)
    return x.reshape(g, blocks.tokens.shape[1], -1, d)

  lse = tokens(lse)[..., 0]
  return (
    jnp.zeros_like(q).at[blocks.tokens].set(tokens(out).astype(q.dtype), mode="drop"),
    jnp.full_like(q[..., 0], -jnp.inf, jnp.float32).at[blocks.tokens].set(lse, mode="drop"),
  )


def _take(x: jax.Array, ids, missing) -> jax.Array:
  return x.at[ids].get(mode="fill", fill_value=missing)
