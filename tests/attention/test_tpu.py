"""The TPU kernel in the interpreter: on the same cases, to the same tolerance, as every backend."""

import functools

import cases
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import attention
from paged_jax.attention import tpu

NAMES = (
  "decode", "mixed", "empty rows", "tokens refused", "head dim 128", "window and start",
  "everything", "bfloat16", "bfloat16 pages, float32 queries",
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.name in NAMES], ids=lambda c: c.name)
def test_the_interpreted_kernel_equals_the_definition_in_float64(case, monkeypatch):
  interpreted = functools.partial(tpu.attend, interpret=True)
  monkeypatch.setitem(attention._BACKENDS, "tpu", interpreted)
  problem = cases.build(case)
  out, lse = problem.attend("tpu")
  for got, want in zip((out, lse), cases.dense(case, problem)):
    np.testing.assert_allclose(
      np.asarray(got.astype(jnp.float32)), np.asarray(want, np.float32), case.tolerance,
      case.tolerance,
    )  # fmt: skip
