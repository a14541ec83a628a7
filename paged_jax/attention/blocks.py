"""Blocks of queries: how a part of a batch is cut, and its queries by block.

Letters as in types.py; G blocks, X tokens in a block, M = X * query heads per KV head. Heads that
share a KV head stand side by side.
"""

import jax
import jax.numpy as jnp

from paged_jax.attention import softmax
from paged_jax.types import Blocks, Part

_NEVER = jnp.iinfo(jnp.int32).max


def schedule(
  rows: jax.Array,
  starts: jax.Array,
  last: jax.Array,
  num_rows: int,
  most: int,
  block_size: int,
) -> Blocks:
  """Cuts tokens into blocks, each of one row.

  Args:
    rows: i32[B] row of each token, each row in one piece; `num_rows` is padding, anywhere between.
    starts: i32[B] first live token of its row.
    last: i32[B] its position, -1 = it attends to nothing.
    num_rows: S.
    most: Rows that there are at most, not counting padding.
    block_size: Most tokens in a block.
  """
  b = rows.shape[0]
  num_blocks = (b + min(most, num_rows, b) * (block_size - 1)) // block_size
  tokens = jnp.arange(b, dtype=jnp.int32)
  fresh = jnp.pad(rows[1:] != rows[:-1], (1, 0), constant_values=True)
  nth = tokens - jax.lax.cummax(jnp.where(fresh, tokens, 0))  # number of each token in its row
  known = (rows >= 0) & (rows < num_rows)
  leads = known & (nth % block_size == 0)
  owner = jnp.where(known, jnp.cumsum(leads, dtype=jnp.int32) - 1, num_blocks)
  leader = jnp.where(leads, owner, num_blocks)
  first = jnp.full(num_blocks, b, jnp.int32).at[leader].set(tokens, mode="drop")
  lengths = jnp.zeros(num_blocks, jnp.int32).at[owner].add(1, mode="drop")
  within = jnp.arange(block_size, dtype=jnp.int32)[None]
  queries = jnp.where(within < lengths[:, None], first[:, None] + within, b)
  ends = _take(last, queries, -1)
  live = (last >= 0) & (owner < num_blocks)
  return Blocks(
    num_blocks=jnp.sum(leads & (owner < num_blocks), dtype=jnp.int32),
    first=first,
    lengths=lengths,
    rows=_take(rows, first, num_rows),
    starts=_take(starts, first, 0),
    lows=jnp.min(jnp.where(ends < 0, _NEVER, ends), axis=1),
    highs=jnp.max(ends, axis=1),
    tokens=jnp.where(ends < 0, b, queries),
    last=ends,
    places=jnp.where(live, owner * block_size + nth % block_size, num_blocks * block_size),
  )


def queries(q: jax.Array, h: int, part: Part) -> tuple[jax.Array, jax.Array]:
  """Queries q [B,Q,D] by block: [G,H,M,D], any where there is none; and where each block's are, i32[G].

  Blocks of one token are where the token is: nothing is moved.
  """
  first = part.blocks.first
  if part.block_size == 1:
    return by_head(q[:, None], h), jnp.minimum(first, q.shape[0] - 1)
  arranged = q.at[part.blocks.tokens].get(mode="clip")
  return by_head(arranged, h), jnp.arange(first.shape[0], dtype=jnp.int32)


def per_query(x: jax.Array, group: int) -> jax.Array:
  """[G,X] as [G,M]: the same for all of the `group` heads that share a KV head."""
  return jnp.repeat(x, group, axis=1)


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
  """Sums over nothing, or over the sinks alone, for queries [H,M,D] as wide as values."""
  h, m, _ = queries.shape
  acc = jnp.zeros_like(queries, jnp.float32)
  zero = acc[..., :1]
  if sinks is None:
    return softmax.Sums(zero - jnp.inf, zero, acc)
  by_head = sinks.reshape(h, -1)
  tops = jnp.tile(by_head, (1, m // by_head.shape[1]))
  return softmax.Sums(zero + tops[..., None], zero + 1, acc)


def by_token(x: jax.Array, part: Part, missing: float) -> jax.Array:
  """[G,H,M,E], as `queries` come, by token: [B,Q,E], `missing` for tokens that attend to nothing."""
  x = by_query(x, part.block_size)
  if part.block_size == 1:  # what attends to nothing was not written
    return jnp.where(part.last[:, None, None] >= 0, x[:, 0], missing)
  return _take(x.reshape(-1, *x.shape[2:]), part.blocks.places, missing)


def _take(x: jax.Array, ids, missing) -> jax.Array:
  return x.at[ids].get(mode="fill", fill_value=missing)
