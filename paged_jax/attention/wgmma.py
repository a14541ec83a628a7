"""What a warpgroup of Hopper does to the 64 rows of its queries: products (wgmma), and the softmax.

`softmax.step` in a form of its own: a wgmma multiplies references, and a warpgroup holds no [64,1].
Letters as in hopper.py; K channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_jax.attention import softmax

ROWS = 64  # of a wgmma


def clear(values_ref, live: Callable, warpgroup, clean) -> None:
  """Zeroes the values [X,D] of a chunk that are not live: 0 * NaN is NaN in a product, too."""

  @pl.when(warpgroup == 0)
  def _():
    x, d = values_ref.shape
    kept = live(iota((x, 64), 0))
    for i in range(0, d, 64):
      ref = values_ref.at[:, pl.ds(i, 64)]
      ref[...] = jnp.where(kept, ref[...], jnp.zeros((), ref.dtype))
    plgpu.commit_smem()

  plgpu.barrier_arrive(clean)
  plgpu.barrier_wait(clean)


def step(sums: softmax.Sums, logits: jax.Array, add: Callable) -> softmax.Sums:
  """`softmax.step` in base 2, with statistics [64]: a warpgroup holds no [64,1]."""
  top = jnp.maximum(sums.top, jnp.max(logits, axis=1))
  base = jnp.where(top == -jnp.inf, 0, top)
  weights = jnp.exp2(logits - column(base, logits.shape[1]))
  decay = jnp.exp2(sums.top - base)
  return softmax.Sums(
    top=top,
    total=sums.total * decay + jnp.sum(weights, axis=1),
    acc=add(sums.acc * column(decay, sums.acc.shape[1]), weights),
  )


def dot(a_ref, b_ref) -> jax.Array:
  """a [64,K] times b [K,X]."""

  def multiply(acc_ref):
    plgpu.wgmma(acc_ref, a_ref, b_ref)
    return acc_ref[...]

  shape = (a_ref.shape[0], b_ref.shape[1])
  return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_dot(acc: jax.Array, weights: jax.Array, values_ref, weights_ref):
  """acc + weights [64,X] times values [X,D]."""
  weights = weights.astype(values_ref.dtype)
  if weights_ref is None:
    add = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, values_ref))
    return add(plgpu.WGMMAAccumulatorRef.init(acc))
  weights_ref[...] = weights  # the interpreter has neither run_state nor operands in registers
  return acc + dot(weights_ref, values_ref)


def tiled(x: jax.Array) -> jax.Array:
  """x [64,K] in the registers of a product's result."""
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def by_row(x: jax.Array) -> jax.Array:
  """x [64] in the registers of a sum over the columns of a product's result."""
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def column(x: jax.Array, width: int) -> jax.Array:
  """x [64] in each of `width` columns."""
  return lax.broadcast_in_dim(x, (x.shape[0], width), (0,))


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
  """i32 `shape`, the index along `axis`, in the registers of a product's result."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
