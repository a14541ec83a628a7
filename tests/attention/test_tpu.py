"""The TPU kernels interpreted: on the same cases, to the same tolerance, as every backend."""

import dataclasses
import functools
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from paged_jax import attention, pages_tpu
from paged_jax import pages as pages_lib
from paged_jax.attention import tpu
from paged_jax.types import Pages

SERVED = [c for c in cases.CASES if not c.bits and c.dtype != "float16"]
# of every kind one, small: the interpreter that knows of races and uninitialised memory is slow
STRICT = ("decode", "mixed", "empty rows", "tokens refused", "window and start", "everything",
          "bfloat16, page size 1")  # fmt: skip
races = functools.partial(
  pltpu.InterpretParams, detect_races=True, uninitialized_memory="nan", random_seed=0
)
every_dma_mode = pytest.mark.parametrize("mode", ["eager", "on_wait"])


@pytest.fixture
def interpreted(monkeypatch):
  """Lets the backend "tpu" run interpreted."""

  def use(interpret):
    attend = functools.partial(tpu.attend, interpret=interpret)
    backend = types.SimpleNamespace(attend=attend)
    monkeypatch.setitem(attention._BACKENDS, "tpu", backend)

  return use


def check(case):
  problem = cases.build(case)
  out, lse = problem.attend("tpu")
  for got, want in zip((out, lse), cases.dense(case, problem)):
    np.testing.assert_allclose(
      np.asarray(got.astype(jnp.float32)), np.asarray(want, np.float32), case.tolerance,
      case.tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_the_kernel_equals_the_definition_in_float64(case, interpreted):
  interpreted(True)
  check(case)


@every_dma_mode
@pytest.mark.parametrize(
  "case", [c for c in cases.CASES if c.name in STRICT], ids=lambda case: case.name
)
def test_no_copy_races_and_nothing_uninitialised_is_used(case, mode, interpreted):
  interpreted(races(dma_execution_mode=mode))
  check(case)
  assert not _races_found()
