"""Makes docs/benchmarks.md, and README's table, from `headlines.toml` and the runs in `results/`."""

import pathlib

from paged_jax.cli import bench

FOLDER = pathlib.Path(__file__).parent
PAGE, README = FOLDER.parent / "docs" / "benchmarks.md", FOLDER.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/table.py -->\n", "<!-- end -->\n"
INTRODUCTION = """\
# Benchmarks

Made by `python benchmarks/table.py` from the runs in `benchmarks/results/`; not to be edited by hand.
`paged-jax bench NAME` repeats the rows of a script, `paged-jax bench --list` says what each asks.

If a row names no other machine, two shared CPU cores measured it: trust its ratios more than its
seconds. "a, b" answers both parts of a question, "(c)" the part in brackets.

"""
NOTES = """
Decode attention on CPU is faster than attention over a cache laid out as models write it, and slower
than over one laid out by heads: XLA copies a page before a product can read it. With jax 0.12 batches
on rows of maximum length run twice as fast on a CPU as with 0.10, so the engine gains less over them.
Drafts add arithmetic, of which a CPU has little to spare: they pay with few rows.
"""


def page() -> str:
  """The text of docs/benchmarks.md."""
  return INTRODUCTION + table(bench.rows(FOLDER)) + NOTES


def readme() -> str:
  """The text of README.md with its table as it is now."""
  before, rest = README.read_text(encoding="utf-8").split(BEGIN)
  _, after = rest.split(END)
  rows = [row for row in bench.rows(FOLDER) if row.readme]
  return before + BEGIN + table(rows) + END + after


def table(rows: list[bench.Row]) -> str:
  """Markdown of all rows that have an answer."""
  names = bench.series(FOLDER, rows)
  lines = [["script", "question", *(f"jax {name}" for name in names)], ["---"] * (2 + len(names))]
  for row in rows:
    if recorded := row.recorded(FOLDER):
      answers = (recorded.get(name, "not run") for name in names)
      lines.append([f"`{row.script}.py`", row.question, *answers])
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
  PAGE.write_text(page(), encoding="utf-8")
  README.write_text(readme(), encoding="utf-8")
