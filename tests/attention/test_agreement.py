import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

IMPLEMENTATIONS = ("reference", "xla")
every_case = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def close(got, want, tolerance):
  np.testing.assert_allclose(
    np.asarray(got.astype(jnp.float32)), np.asarray(want, np.float32), tolerance, tolerance
  )


@every_case
@every_implementation
def test_output_and_lse_equal_the_definition_in_float64(case, implementation):
  problem = cases.build(case)
  out, lse = problem.attend(implementation)
  want_out, want_lse = cases.dense(case, problem)
  assert out.dtype == problem.q.dtype and lse.dtype == jnp.float32
  close(out, want_out, case.tolerance)
  close(lse, want_lse, case.tolerance)
