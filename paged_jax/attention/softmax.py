"""The online softmax: sums over any number of pieces, in any order, in float32.

Online normalizer: Milakov and Gimelshein 2018; with values: Rabe and Staats 2021.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
  """What has been seen so far."""

  top: jax.Array  # f32[...,1] largest logit
  total: jax.Array  # f32[...,1] sum of exp(logit - top)
  acc: jax.Array  # f32[...,D] sum of exp(logit - top) * value


def step(sums: Sums, logits: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> Sums:
  """Adds a piece: `logits` f32[...,X], -inf where masked; `weigh` sums values f32[...,X] -> [...,D].

  A piece that is masked everywhere changes nothing.
  """
  top = jnp.maximum(sums.top, jnp.max(logits, axis=-1, keepdims=True))
  base = _finite(top)
  weights = jnp.exp(logits - base)
  decay = jnp.exp(sums.top - base)
  return Sums(
    top=top,
    total=sums.total * decay + jnp.sum(weights, axis=-1, keepdims=True),
    acc=sums.acc * decay + weigh(weights),
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
