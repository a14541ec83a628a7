"""The TPU kernels through the real TPU compiler, which needs no TPU but the libtpu wheel."""

import pytest
from scripts import needs_tpu_compiler, run


@pytest.mark.libtpu
@needs_tpu_compiler
@pytest.mark.timeout(900)
def test_the_kernels_and_a_whole_decode_step_compile_in_place_and_keep_their_bundles():
  found = run("kernels_tpu_aot.py", "--generations", "v6e", "--models", "1")
  assert found["temp_share_of_pool"] < 0.01
  assert found["collectives"] == 0
  assert all(row.get("aliased", 1) >= 1 for row in found["rows"])
  assert found["bundles_2048_v6e_bf16_p16"] <= 5424
  assert found["bundles_2048_v6e_bf16_p64"] <= 3500
  assert found["write_prefill_2048"] <= 25_000
  assert found["bundles_vs_jax_rpa"] <= 1
  assert found["prefill_64x512"] <= 4600
  assert found["mixed_vs_apart"] <= 1.1
  assert found["mixed_vs_jax_rpa"] <= 0.6
  assert found["drafts_vs_plain"] <= 1.05
  assert found["plan_ops_in_layer"] == 0
  assert found["mla_decode_vs_bandwidth"] <= 1.25


@pytest.mark.libtpu
@needs_tpu_compiler
@pytest.mark.timeout(900)
def test_the_kernels_for_8_bit_pages_compile_in_place_and_keep_their_bundles():
  found = run("eightbit_tpu_aot.py", "--generations", "v6e")
  assert found["temp_share_of_pool"] < 0.01
  assert found["aliased"] >= 1
  assert {row["KV heads"] for row in found["rows"] if row["dtype"] == "int8"} == {1, 2, 8}
  assert found["int8_bundles_2048_v6e_p128"] <= 3650
