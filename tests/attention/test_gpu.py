import functools
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import attention
from paged_jax.attention import gpu


@pytest.fixture
def interpreted(monkeypatch):
  backend = types.SimpleNamespace(attend=functools.partial(gpu.attend, interpret=True))
  monkeypatch.setitem(attention._BACKENDS, "gpu", backend)


def check(case):
  problem = cases.build(case)
  out, lse = problem.attend("gpu")
  for got, want in zip((out, lse), cases.dense(case, problem)):
    np.testing.assert_allclose(
      np.asarray(got.astype(jnp.float32)), np.asarray(want, np.float32), case.tolerance,
      case.tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_the_kernel_equals_the_definition_in_float64(case, interpreted):
  check(case)
