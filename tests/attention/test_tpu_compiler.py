"""The TPU kernels through the real TPU compiler, which needs no TPU but the libtpu wheel."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "kernels_tpu_aot.py"
needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed"
)


@pytest.mark.libtpu
@needs_compiler
@pytest.mark.timeout(900)
def test_the_kernels_and_a_whole_decode_step_compile_in_place_and_keep_their_bundles():
  command = [sys.executable, SCRIPT, "--generations", "v6e", "--models", "1", "--json"]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-2000:]
  found = json.loads(run.stdout.splitlines()[-1])
  assert found["temp_share_of_pool"] < 0.01
  assert found["collectives"] == 0
  assert all(row.get("aliased", 1) >= 1 for row in found["rows"])
  assert found["bundles_2048_v6e_bf16_p16"] <= 5424
  assert found["bundles_2048_v6e_bf16_p64"] <= 4016
  assert found["bundles_vs_jax_rpa"] <= 1
