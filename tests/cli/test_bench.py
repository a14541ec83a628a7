"""On a checkout with two scripts, one of which fails."""

import json

import pytest
from command_line import assert_refused

HEADLINES = """
[[row]]
script = "speed"
question = "How fast?"
value = "{speed:.1f}, {rows[1][n]}"
readme = true

[[row]]
script = "speed"
question = "How fast on a GPU?"
value = "{gpu:.1f}"

[[row]]
script = "broken"
question = "What breaks?"
value = "{nothing}"
"""


@pytest.fixture
def checkout(tmp_path):
  folder = tmp_path / "benchmarks"
  (folder / "results").mkdir(parents=True)
  (folder / "headlines.toml").write_text(HEADLINES)
  found = {"speed": 2.345, "rows": [{"n": 3}, {"n": 4}]}
  (folder / "speed.py").write_text(
    f'"""How fast is it?\n\nVery."""\nprint("a table")\nprint(\'{json.dumps(found)}\')\n'
  )
  (folder / "broken.py").write_text('"""What breaks?"""\nraise SystemExit("no luck")\n')
  for name, jax, date, speed in [
    ("a", "0.12.1", "2026-02-02", 1.0), ("b", "0.12.0.1", "2026-01-01", 9.0), ("c", "0.9.2", "", 7.0),
  ]:  # fmt: skip
    run = found | {"speed": speed, "where": {"jax": jax}, "date": date}
    (folder / "results" / f"speed-{name}.json").write_text(json.dumps(run))
  return tmp_path


def test_answers_stand_beside_the_newest_recorded_ones(paged_jax, checkout, monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  code, out, err = paged_jax("bench", "--folder", checkout)
  assert (code, err) == (0, "running speed.py (1 of 1)\n")
  heading, fast, gpu = (line for line in out.splitlines() if "question" in line or "How" in line)
  assert heading.index("here") < heading.index("jax 0.9,") < heading.index("jax 0.12,")
  assert fast.index("2.3, 4") < fast.index("7.0, 4") < fast.index("1.0, 4")
  assert "9.0" not in out and "0" not in gpu


def test_a_script_that_fails_says_why_and_the_others_run(paged_jax, checkout):
  code, out, err = paged_jax("bench", "broken", "speed", "--folder", checkout)
  assert code == 1
  assert "broken.py failed: no luck\n" in err
  assert "2.3, 4" in out


def test_list_shows_what_each_script_asks(paged_jax, checkout):
  code, out, _ = paged_jax("bench", "--list", "--folder", checkout)
  assert code == 0
  assert [line.split(maxsplit=1) for line in out.splitlines()] == [
    ["speed", "How fast is it?"], ["broken", "What breaks?"],
  ]  # fmt: skip


def test_bad_input_is_one_line_and_exit_code_2(paged_jax, checkout, tmp_path):
  message = "there is no benchmark named 'nope'; --list shows them"
  assert_refused(paged_jax("bench", "speed", "nope", "--folder", checkout), message)
  nowhere = tmp_path / "nowhere"
  message = (
    f"there is no {nowhere / 'benchmarks' / 'headlines.toml'}: the benchmarks are in the source"
  )
  assert_refused(paged_jax("bench", "--folder", nowhere), message)
