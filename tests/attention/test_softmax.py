import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.attention import softmax


def nothing(*shape, d):
  one = jnp.zeros((*shape, 1))
  return softmax.Sums(one - jnp.inf, one, jnp.zeros((*shape, d)))


def attend(logits, values):
  """The definition, in float64."""
  weights = np.exp(np.asarray(logits, np.float64))
  total = weights.sum(-1)
  return weights @ np.asarray(values, np.float64) / total[..., None], np.log(total)


def attend_in_pieces(logits, values, sizes):
  sums, cuts = nothing(*logits.shape[:-1], d=values.shape[-1]), np.cumsum([0, *sizes])
  for low, high in itertools.pairwise(cuts):
    part = values[low:high]
    sums = softmax.step(sums, logits[..., low:high], part)
  out, lse = softmax.finish(sums)
  return out, lse[..., 0]


def test_one_step_by_hand():
  logits, values = jnp.log(jnp.array([1.0, 3.0])), jnp.array([[8.0], [4.0]])
  out, lse = softmax.finish(softmax.step(nothing(d=1), logits, values))
  np.testing.assert_allclose(out, [5.0], rtol=1e-6)  # (1*8 + 3*4) / 4
  np.testing.assert_allclose(lse, np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(12,), (1, 11), (4, 4, 4)])
def test_pieces_add_up_to_the_whole(sizes):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(20 * rng.standard_normal((3, 12)), jnp.float32)
  values = jnp.asarray(rng.standard_normal((12, 5)), jnp.float32)
  for got, want in zip(attend_in_pieces(logits, values, sizes), attend(logits, values)):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
  logits = jnp.array([1e4, 1e4 - 1, -1e4])
  out, lse = attend_in_pieces(logits, jnp.eye(3), (1, 2))
  np.testing.assert_allclose(out, [0.731059, 0.268941, 0], rtol=1e-5)
  np.testing.assert_allclose(lse, 1e4 + 0.313262)


def test_masked_piece_changes_nothing():
  logits = jnp.array([0.5, -1.0, -jnp.inf, -jnp.inf])
  values = jnp.arange(8.0).reshape(4, 2)
  for got, want in zip(
    attend_in_pieces(logits, values, (2, 2)), attend_in_pieces(logits[:2], values[:2], (2,))
  ):
    np.testing.assert_array_equal(got, want)


def test_nothing_seen_gives_zero_and_minus_infinity():
  out, lse = attend_in_pieces(jnp.full((2, 3), -jnp.inf), jnp.ones((3, 4)), (1, 2))
  np.testing.assert_array_equal(out, np.zeros((2, 4)))
  np.testing.assert_array_equal(lse, np.full(2, -np.inf))


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_merge_of_two_parts_is_the_whole(cut):
  rng = np.random.default_rng(1)
  logits = jnp.asarray(5 * rng.standard_normal((3, 12)), jnp.float32)
  values = jnp.asarray(rng.standard_normal((12, 5)), jnp.float32)
  a = attend_in_pieces(logits[:, :cut], values[:cut], (cut,))
  b = attend_in_pieces(logits[:, cut:], values[cut:], (12 - cut,))
  for got, want in zip(softmax.merge(*a, *b), attend(logits, values)):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_merge_with_an_empty_part_is_the_other_part():
  out, lse = jnp.array([[1.0, 2.0]]), jnp.array([3.0])
  empty = jnp.zeros((1, 2)), jnp.array([-jnp.inf])
  for got in (softmax.merge(out, lse, *empty), softmax.merge(*empty, out, lse)):
    np.testing.assert_array_equal(got[0], out)
    np.testing.assert_array_equal(got[1], lse)
  np.testing.assert_array_equal(softmax.merge(*empty, *empty)[1], [-np.inf])


def test_merge_keeps_the_dtype_of_the_output():
  out, lse = jnp.ones((1, 2), jnp.bfloat16), jnp.zeros(1)
  merged, lse = softmax.merge(out, lse, out, lse)
  assert merged.dtype == jnp.bfloat16
  assert lse.dtype == jnp.float32


def test_logits_are_scaled_then_capped_then_masked():
  q, k = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [1.0, 0.0], [5.0, 5.0]])  # 11, 1, 15
  seen = jnp.array([[True, True, False]])
  plain = softmax.logits(softmax.product(q, k), seen, jnp.float32(0.5), None)
  np.testing.assert_allclose(plain, [[5.5, 0.5, -np.inf]])
  capped = softmax.logits(softmax.product(q, k), seen, jnp.float32(0.5), jnp.float32(2))
  np.testing.assert_allclose(capped, [[2 * np.tanh(2.75), 2 * np.tanh(0.25), -np.inf]], rtol=1e-6)


def test_heads_are_multiplied_side_by_side():
  rng = np.random.default_rng(2)
  q, k, v = (jnp.asarray(rng.standard_normal((2, n, 4)), jnp.float32) for n in (3, 5, 5))
  seen = jnp.ones((3, 5), bool)
  together = softmax.logits(softmax.product(q, k), seen[None], jnp.float32(1), None)
  out, _ = softmax.finish(softmax.step(nothing(2, 3, d=4), together, v))
  for head in range(2):
    logits = softmax.logits(softmax.product(q[head], k[head]), seen, jnp.float32(1), None)
    np.testing.assert_allclose(together[head], logits, rtol=1e-6, atol=1e-6)
    alone, _ = softmax.finish(softmax.step(nothing(3, d=4), logits, v[head]))
    np.testing.assert_allclose(out[head], alone, rtol=1e-5, atol=1e-6)


def test_operands_of_two_dtypes_are_multiplied_in_float32():
  half, single = jnp.ones(1, jnp.bfloat16), jnp.ones(1)
  assert [x.dtype for x in softmax.operands(half, half)] == [jnp.bfloat16] * 2
  assert [x.dtype for x in softmax.operands(half, single)] == [jnp.float32] * 2
