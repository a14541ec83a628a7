"""The benchmarks that decide and count, rather than time, run in small and count right; the page
that shows recorded runs is up to date."""

import json
import os

import pytest
from scripts import FOLDER, run

from paged_jax.cli import bench


@pytest.mark.once
def test_preemption_times_both_ways(tmp_path):
  found = run("preemption.py", "--smoke", "--rounds", 2, "--picture", tmp_path / "it.png")
  (row,) = found["rows"]
  assert row["recompute/swap"] == pytest.approx(row["recompute ms"] / row["swap ms"])
  assert (tmp_path / "it.png").stat().st_size > 0


@pytest.fixture
def trace(tmp_path):
  """24 requests at once, whose prompts of 600 tokens have their first 512 in common."""
  lines = [
    {"timestamp": 0, "input_length": 600, "output_length": 400, "hash_ids": [0, i]}
    for i in range(1, 25)
  ]
  path = tmp_path / "trace.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  return path


# 16 run at once, on 16 pages of 64 tokens each, 8 of which all but the first step's four share.
@pytest.mark.once
@pytest.mark.parametrize(
  "pool, preemption, preempted",
  [(160, "swap", None), (128, "swap", "swaps"), (128, "recompute", "recomputations")],
)
def test_replay_preempts_only_where_pages_run_out(
  trace, tmp_path, pool, preemption, preempted, monkeypatch, capsys
):
  monkeypatch.syspath_prepend(FOLDER)
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the script adds to it
  import replay

  replay.main([
    "--json", f"--trace={trace}", "--costs=1e-2,1e-4,1e-7,1e-5,1e-6", "--num-rows=16",
    f"--pool={64 * pool}", f"--preemption={preemption}", f"--picture={tmp_path / 'it.png'}",
  ])  # fmt: skip
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["requests"] == 24 and found["most_at_once"] == 16
  assert {name for name in ("swaps", "recomputations") if found[name]} == {preempted} - {None}
  assert found["hit_rate"] == pytest.approx(20 * 512 / (24 * 600))
  assert (tmp_path / "it.png").stat().st_size > 0


@pytest.mark.once
def test_groups_count_bytes_and_hits(trace):
  found = run("groups.py", "--parts", "bytes,hits", "--mooncake", trace, "--ends", 8)
  # 512 pages for all tokens, 33 for a window of 512 tokens anyhow aligned
  assert found["bytes_vs_uniform"] == pytest.approx((4 * 512 + 22 * 33) / (26 * 512))
  assert found["bytes_vs_bound"] == pytest.approx(1, abs=0.03)
  assert found["hit_rate"] == pytest.approx(23 * 512 / (24 * 600))
  assert found["hit_rate_vs_uniform"] == 1


@pytest.mark.once
def test_eight_bits_read_a_text_as_well_as_sixteen():
  found = run("eightbit.py", "--parts", "text,bytes", "--tokens", 1024)
  assert found["ppl_ratio_int8"] <= 1.005 and found["ppl_ratio_fp8"] <= 1.01
  assert 0 < found["logp_mean_int8"] < found["logp_mean_fp8"] < 0.1
  assert found["bytes_per_token_int8_d128"] == (128 + 4) / 256


PROGRAM = """HloModule jit_run, is_scheduled=true

FileNames
1 "paged_jax/pages.py"

FunctionNames
1 "run"
2 "renew.<locals>.clear"
3 "draw"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=0 end_column=9}
2 {file_name_id=1 function_name_id=2 line=5 end_line=5 column=0 end_column=9}
3 {file_name_id=1 function_name_id=3 line=7 end_line=7 column=0 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

%layer (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0:T(128)S(1)} fusion(%p.1), kind=kLoop, backend_config={"estimated_cycles":"100"}
  ROOT %paged_attention.2 = (f32[8]{0:T(128)}, f32[8]{0}) custom-call(%fusion.1), custom_call_target="tpu_custom_call"
}

%layers (p.2: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[] constant(32)
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.1, %constant.1), direction=LT
}

%page (p.3: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %fusion.2 = f32[8]{0} fusion(%p.3), kind=kLoop, metadata={op_name="a" stack_frame_id=2}, backend_config={"estimated_cycles":"10"}
}

%pages (p.4: (s32[], s32[])) -> pred[] {
  ROOT %lt.2 = pred[]{:T(512)} compare(%gte.2, %gte.3), direction=LT
}

%cold (p.5: f32[8]) -> s32[8] {
  ROOT %fusion.3 = s32[8]{0} fusion(%p.5), kind=kLoop, backend_config={"estimated_cycles":"1"}
}

%warm (p.6: f32[8]) -> s32[8] {
  ROOT %sort.1 = s32[8]{0} sort(%p.6), dimensions={0}, metadata={op_name="b" stack_frame_id=3}
}

ENTRY %main (p.7: f32[8]) -> s32[8] {
  %copy-start.1 = (bf16[1640,8]{1,0:T(8,128)S(1)}, bf16[1640,8]{1,0}, u32[]{:S(2)}) copy-start(%p.7)
  %copy-done.1 = bf16[1640,8]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %while.1 = (s32[], f32[8]{0}) while(%t.1), condition=%layers, body=%layer, metadata={op_name="c" stack_frame_id=1}
  %while.2 = (s32[], s32[]) while(%t.2), condition=%pages, body=%page, metadata={op_name="c" stack_frame_id=1}
  ROOT %conditional.1 = s32[8]{0} conditional(%c, %t.3, %t.4), branch_computations={%cold, %warm}, metadata={op_name="d" stack_frame_id=3}
}
"""


def test_cycles_are_summed_over_turns_of_loops_and_the_branches_taken(monkeypatch):
  monkeypatch.syspath_prepend(FOLDER)
  import cycles

  def estimate(**options):
    return cycles.estimate(PROGRAM, "v6e", {"paged_attention": 1000}, **options)

  copied = 1640 * 8 * 2 / 1.64e12 * 1.755e9
  once = estimate(turns={})
  assert once.total == pytest.approx(copied + 32 * 1100 + 10 + 1) and once.unestimated == 0
  drawn = estimate(turns={"renew.<locals>.clear": 3}, taken={"draw"})
  assert drawn.total == pytest.approx(copied + 32 * 1100 + 30) and drawn.unestimated == 1


def test_the_page_and_the_readme_show_the_recorded_runs(monkeypatch):
  monkeypatch.syspath_prepend(FOLDER)
  import table

  assert table.PAGE.read_text() == table.page(), "run benchmarks/table.py"
  assert table.README.read_text() == table.readme(), "run benchmarks/table.py"


def test_each_script_that_reports_has_a_row():
  reporting = {path.stem for path in FOLDER.glob("*.py") if "measure.report(" in path.read_text()}
  rows = bench.rows(FOLDER)
  assert {row.script for row in rows} == reporting
  assert len([row for row in rows if row.readme]) == 5
