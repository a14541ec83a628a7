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
