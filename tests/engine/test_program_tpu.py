"""The engine's device program through the real TPU compiler, which needs no TPU but libtpu."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "engine_tpu_aot.py"
needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed"
)


@pytest.mark.libtpu
@needs_compiler
@pytest.mark.timeout(900)
def test_steps_of_a_whole_model_compile_in_place_and_need_no_more_memory_for_a_larger_pool():
  command = [
    sys.executable, SCRIPT, "--generations", "v5e", "--variants", "decode", "--model", "1B", "--json",
  ]  # fmt: skip
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-2000:]
  found = json.loads(run.stdout.splitlines()[-1])
  assert found["copied_leaves"] == 0
  assert found["growth"] < 0.01
  assert found["collectives"] == 0
