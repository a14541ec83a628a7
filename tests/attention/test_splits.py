import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import attention
from paged_jax.attention import splits


@pytest.mark.parametrize(
  "programs, most, n",
  [
    (256, 64, 1),  # more than a wave
    (106, 64, 1),  # 0.8 of a wave
    (105, 64, 5),  # 525 of 4 waves: 0.99
    (66, 64, 2),  # exactly a wave
    (64, 64, 2),  # 128 of 132
    (8, 64, 15),  # 120 of 132: 0.91
    (1, 1000, 113),  # 113 of 132: 0.86
    (8, 3, 3),  # the row has no more chunks
    (1, 1, 1),
    (1, 0, 1),  # no pages at all
  ],
)
def test_the_number_of_splits_fills_waves_of_132(programs, most, n):
  assert splits.count(programs, most, 132) == n


def test_num_sms_without_a_gpu_is_that_of_an_h200():
  assert splits.num_sms() == 132


def test_combined_splits_equal_merged_ones():
  rng = np.random.default_rng(0)
  out = jnp.asarray(rng.standard_normal((2, 3, 2, 4, 8)), jnp.float32)
  lse = jnp.asarray(rng.standard_normal((2, 3, 2, 4)), jnp.float32)
  got_out, got_lse = splits.combine(out, lse)
  want_out, want_lse = attention.merge(out[0], lse[0], out[1], lse[1])
  np.testing.assert_allclose(got_out, want_out, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got_lse, want_lse, rtol=1e-5)


def test_a_split_that_saw_nothing_adds_nothing():
  out = jnp.stack([jnp.ones((1, 1, 2, 4)), jnp.zeros((1, 1, 2, 4))])
  lse = jnp.full((2, 1, 1, 2), -jnp.inf).at[0, 0, 0, 0].set(1.5)  # query 1 sees no key at all
  out = out.at[0, 0, 0, 1].set(0)
  got_out, got_lse = splits.combine(out, lse)
  np.testing.assert_array_equal(got_out[0, 0, :, 0], [1, 0])
  np.testing.assert_array_equal(got_lse[0, 0], [1.5, -np.inf])
