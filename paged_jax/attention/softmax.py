"""Products, and the online softmax: sums over any number of pieces, in any order, in float32.

Online normalizer: Milakov and Gimelshein 2018; with values: Rabe and Staats 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
  """What has been seen so far."""

  top: jax.Array  # f32[...,1] largest logit
  total: jax.Array  # f32[...,1] sum of exp(logit - top)
  acc: jax.Array  # f32[...,D] sum of exp(logit - top) * value


def operands(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """What is multiplied: the arrays as they are if all have one dtype, else all in float32."""
  same = len({x.dtype for x in arrays}) == 1
  return arrays if same else tuple(x.astype(jnp.float32) for x in arrays)


def logits(
  q: jax.Array,
  k: jax.Array,
  seen: jax.Array,
  scale: jax.Array,
  softcap: jax.Array | None,
) -> jax.Array:
  """Logits f32[...,M,X] of queries [...,M,D] and keys [...,X,D], -inf where not `seen`."""
  out = _dot(q, k, -1) * scale
  if softcap is not None:
    out = softcap * jnp.tanh(out / softcap)
  return jnp.where(seen, out, -jnp.inf)


def step(sums: Sums, logits: jax.Array, v: jax.Array) -> Sums:
  """Adds a piece: logits f32[...,M,X], -inf where masked, and its values [...,X,D].

  A piece that is masked everywhere changes nothing.
  """
  top = jnp.maximum(sums.top, jnp.max(logits, axis=-1, keepdims=True))
  base = _finite(top)
  weights = jnp.exp(logits - base)
  decay = jnp.exp(sums.top - base)
  return Sums(
    top=top,
    total=sums.total * decay + jnp.sum(weights, axis=-1, keepdims=True),
    acc=sums.acc * decay + _dot(weights.astype(v.dtype), v, -2),
  )


def finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
  """The attention output f32[...,D] and LSE f32[...,1]; 0 and -inf if nothing was seen."""
  out = sums.acc / jnp.where(sums.total > 0, sums.total, 1)
  return out, sums.top + jnp.log(sums.total)


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
