"""8-bit numbers with a scale per vector: symmetric, and computed from the vector alone.

    # vector   [0.5 -2.0 1.0 0.0]        largest 2.0, so the scale is 2.0 / 127
    # int8     [ 32 -127  64   0]        read as number x scale

No calibration and no neighbours: the same vector has the same bits in every batch, row, order and
on every number of devices. Per token and head this is the scheme that KIVI (arXiv 2402.02750, §3)
calls per-token, with a zero point of 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest number of each format


def quantized(dtype: DTypeLike) -> bool:
  """Whether values of this dtype have a scale."""
  return np.dtype(dtype).name in LIMITS


def quantize(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
  """Numbers [...,D] of `dtype`, and scales f32[...]: x is about number * scale.

  int8 is off by at most half a scale, float8_e4m3fn by at most 1/16 of each value (1/1024 of the
  scale for the smallest). A vector is zero if its scale would be below the least normal float32: if
  all of it is below 1.5e-36 (int8) or 5.3e-36. A vector with a NaN or an infinity has the scale NaN,
  and numbers of 0: all of it reads NaN.
  """
  x, limit = x.astype(jnp.float32), np.float32(LIMITS[np.dtype(dtype).name])
  top = jnp.max(jnp.abs(x), axis=-1)
  scale = top * (1 / limit)
  usable = (scale >= jnp.finfo(jnp.float32).tiny) & (top < jnp.inf)
  inverse = jnp.where(usable, limit / jnp.where(usable, top, 1), 0)[..., None]
  numbers = jnp.where(inverse > 0, x * inverse, 0)
  numbers = jnp.round(numbers) if np.dtype(dtype) == jnp.int8 else numbers
  scale = jnp.where(usable, scale, jnp.where(top < 1, 0.0, jnp.nan))
  return numbers.astype(dtype), scale


def dequantize(numbers: jax.Array, scale: jax.Array) -> jax.Array:
  """f32[...,D] what numbers [...,D] and scales f32[...] stand for."""
  return numbers.astype(jnp.float32) * scale[..., None]
