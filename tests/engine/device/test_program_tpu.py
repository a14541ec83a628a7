"""The engine's device program through the real TPU compiler, which needs no TPU but libtpu."""

import pytest
from scripts import needs_tpu_compiler, run


@pytest.mark.libtpu
@needs_tpu_compiler
@pytest.mark.timeout(900)
def test_steps_of_a_whole_model_compile_in_place_and_need_no_more_memory_for_a_larger_pool():
  found = run(
    "engine_tpu_aot.py", "--generations", "v5e", "--variants", "decode", "--model", "1B",
    "--steps", "1B:64",
  )  # fmt: skip
  assert found["copied_leaves"] == 0
  assert found["growth"] < 0.01
  assert found["collectives"] == 0
  # By estimates; weights that are copied out of the stack of layers would add to it.
  assert 1 < found["step_vs_bandwidth"] <= 1.53
  assert found["sampled_vs_greedy"] >= 1
