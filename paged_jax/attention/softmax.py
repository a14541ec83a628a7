"""Products, and the online softmax: sums over any number of pieces, in any order, in float32.

Online normalizer: Milakov and Gimelshein 2018; with values: Rabe and Staats 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sums(NamedTuple):
  """What has been seen so far.

  W is 1, or the lanes of a TPU, where a column costs as much as 128: then `top` is the same in all
  of them, and lane j of `total` sums columns j, j + W, j + 2W, ...
  """

  top: jax.Array  # f32[...,W] largest logit
  total: jax.Array  # f32[...,W] sum of exp(logit - top)
  acc: jax.Array  # f32[...,D] sum of exp(logit - top) * value


def operands(q: jax.Array, *kv: jax.Array) -> tuple[jax.Array, ...]:
  """What is multiplied: queries, keys and values in their `operand_dtype`."""
  dtype = operand_dtype(q.dtype, *(x.dtype for x in kv))
  return tuple(x.astype(dtype) for x in (q, *kv))


def operand_dtype(q: np.dtype, *kv: np.dtype) -> np.dtype:
  """In which dtype queries, keys and values are multiplied: as they are if all have one dtype.

  8-bit numbers are exact in bfloat16. Everything else is multiplied in float32.
  """
  exact = q == jnp.bfloat16 and all(x.itemsize == 1 for x in kv)
  return q if exact or all(x == q for x in kv) else np.dtype("float32")


def logits(
  products: jax.Array, seen: jax.Array, scale: jax.Array, softcap: jax.Array | None
) -> jax.Array:
  """Logits f32[...,M,X] from products of queries and keys f32[...,M,X], -inf where not `seen`."""
  out = products * scale
  if softcap is not None:
    out = softcap * jnp.tanh(out / softcap)
  return jnp.where(seen, out, -jnp.inf)


def product(q: jax.Array, k: jax.Array) -> jax.Array:
  """f32[...,M,X] the products of queries [...,M,D] and keys [...,X,D]."""
  return _dot(q, k, -1)


def step(
  sums: Sums, logits: jax.Array, v: jax.Array, exp=jnp.exp, scales: jax.Array | None = None
) -> Sums:
  """Adds a piece: logits f32[...,M,X], -inf where masked, and its values [...,X,D].

  Values are v * `scales` f32[...,1,X] if these are given; a scale must be finite if it is masked.
  A piece that is masked everywhere changes nothing. `exp` may have another base, if all logits, and
  `finish`, have it too.
  """
  top = jnp.maximum(sums.top, jnp.max(logits, axis=-1, keepdims=True))
  base = _finite(top)
  weights = exp(logits - _spread(base, logits.shape[-1]))
  decay = exp(sums.top - base)
  total = sums.total * decay + _by_lane(weights, top.shape[-1])
  weights = weights if scales is None else weights * scales
  acc = sums.acc * _spread(decay, sums.acc.shape[-1]) + _dot(weights.astype(v.dtype), v, -2)
  return Sums(top, total, acc)


def finish(sums: Sums, unit: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """The attention output f32[...,D] and LSE f32[...,W]; 0 and -inf if nothing was seen.

  `unit` is the natural logarithm of the base.
  """
  total = jnp.sum(sums.total, axis=-1, keepdims=True)
  out = sums.acc / jnp.where(total > 0, total, 1)
  return out, sums.top * unit + jnp.log(total)


def merge(
  out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Attention over two disjoint sets of keys, from the attention over each.

  Attention sinks belong to one of the two, or they count twice.

  Args:
    out_a: [...,D] output over the first set.
    lse_a: f32[...] its LSE.
    out_b: [...,D] output over the second set.
    lse_b: f32[...] its LSE.

  Returns:
    The output in `out_a`'s dtype, and the LSE.
  """
  lse = jnp.logaddexp(lse_a, lse_b)
  base = _finite(lse)
  a, b = (
    jnp.exp(part - base)[..., None] * out.astype(jnp.float32)
    for out, part in ((out_a, lse_a), (out_b, lse_b))
  )
  return (a + b).astype(out_a.dtype), lse


def _spread(x: jax.Array, width: int) -> jax.Array:
  """[...,W] for `width` columns, the same in each."""
  w = x.shape[-1]
  return x if w in (1, width) else jnp.concatenate([x] * (width // w), axis=-1)


def _by_lane(weights: jax.Array, w: int) -> jax.Array:
  """Sums [...,W] of every Wth column."""
  if w == 1:
    return jnp.sum(weights, axis=-1, keepdims=True)
  rest = (weights[..., i : i + w] for i in range(w, weights.shape[-1], w))
  return sum(rest, start=weights[..., :w])


def _finite(top: jax.Array) -> jax.Array:
  return jnp.where(top == -jnp.inf, 0, top)  # -inf - -inf is NaN


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """[...,M,K] times b, over its `axis`, in float32."""
  batch = tuple(range(a.ndim - 2))
  precision = "highest" if b.dtype == jnp.float32 else None  # a GPU would take TF32
  return jax.lax.dot_general(
    a, b, (((a.ndim - 1,), (b.ndim + axis,)), (batch, batch)), precision=precision,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
