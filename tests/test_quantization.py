"""Numbers of 8 bits and their scales, against NumPy and against their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import quantization
from paged_jax.attention import cases

both = pytest.mark.parametrize("dtype", quantization.LIMITS)
quantize = jax.jit(quantization.quantize, static_argnames="dtype")


def vectors(count=512, width=64):
  """f32[count,width] of every magnitude, some with one channel far above the others."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((count, width), np.float32)
  x *= (2.0 ** rng.integers(-100, 100, (count, 1))).astype(np.float32)
  x[::3, 5] *= 100
  return x


@both
def test_numbers_and_scales_are_those_of_numpy_bit_for_bit(dtype):
  x = vectors()
  numbers, scales = quantize(x, dtype)
  want_numbers, want_scales = cases.quantized(x, dtype)
  np.testing.assert_array_equal(np.asarray(numbers), want_numbers)
  np.testing.assert_array_equal(scales, want_scales)
  assert numbers.dtype == dtype and scales.dtype == jnp.float32


@both
def test_every_error_is_within_the_documented_bound(dtype):
  x = vectors().astype(np.float64)
  numbers, scales = (np.asarray(y).astype(np.float64) for y in quantize(np.float32(x), dtype))
  error, scale = np.abs(numbers * scales[:, None] - x), scales[:, None]
  bound = 0.5 * scale if dtype == "int8" else np.maximum(np.abs(x) / 16, scale / 1024)
  assert (error <= bound * (1 + 1e-4)).all()
  assert (error > 0.9 * bound).any()  # and the bound is no larger than it must be
  assert (np.abs(numbers).max(axis=-1) == quantization.LIMITS[dtype]).all()


@both
def test_a_vector_has_the_same_bits_alone_and_beside_any_other(dtype):
  x = vectors(24)
  together = quantize(x.reshape(4, 6, 64), dtype)
  for i, each in enumerate(x):
    beside = np.stack([np.full(64, np.nan, np.float32), each])
    for alone in (quantize(each[None], dtype), quantize(beside, dtype)):
      for got, want in zip(alone, together, strict=True):
        np.testing.assert_array_equal(got[-1], want.reshape(24, *want.shape[2:])[i])


@both
@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
def test_any_float_is_taken_and_dequantized_to_float32(dtype, source):
  x = jnp.asarray([[1.0, -2.0, 0.5, 0.0]], source)
  numbers, scales = quantization.quantize(x, dtype)
  read = quantization.dequantize(numbers, scales)
  assert read.dtype == jnp.float32
  np.testing.assert_allclose(read, x.astype(jnp.float32), rtol=0.04)


@both
@pytest.mark.parametrize(
  ("values", "scale"),
  [
    ([0.0, -0.0, 0.0], 0.0),
    ([1e-42, 0.0, -1e-43], 0.0),  # denormals
    ([1e-37, 0.0, 0.0], 0.0),  # its scale would be denormal
    ([np.nan, 1.0, 2.0], np.nan),
    ([1.0, np.inf, 2.0], np.nan),
    ([1.0, -np.inf, np.nan], np.nan),
  ],
)
def test_what_has_no_scale_is_zero_or_says_that_it_is_not_finite(dtype, values, scale):
  numbers, got = quantize(np.array([values], np.float32), dtype)
  assert not np.asarray(numbers).astype(np.float32).any()
  np.testing.assert_array_equal(got, [scale])
  np.testing.assert_array_equal(quantization.dequantize(numbers, got), [[scale] * 3])


def test_the_cast_to_float8_rounds_to_the_nearest_number_ties_to_even():
  """Every number of the format, every point between two, and what is next to it."""
  whole = np.arange(0x7F, dtype=np.uint8).view("float8_e4m3fn").astype(np.float32)
  between = (whole[1:] + whole[:-1]) / 2
  x = np.concatenate(
    [whole, between, np.nextafter(between, 0), np.nextafter(between, np.float32(9e9))]
  )
  got = jax.jit(lambda x: x.astype(jnp.float8_e4m3fn))(np.concatenate([x, -x]))
  want = np.concatenate([x, -x]).astype("float8_e4m3fn")
  np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize(
  ("dtype", "known"),
  [("int8", True), ("float8_e4m3fn", True), ("bfloat16", False), ("uint8", False)],
)
def test_only_formats_with_a_scale_are_quantized(dtype, known):
  assert quantization.quantized(dtype) is known
