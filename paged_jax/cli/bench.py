"""`paged-jax bench`: runs scripts of `benchmarks/` and shows their answers beside recorded ones."""

import ast
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import rich.console
import rich.table
import rich.text
import typer

import paged_jax
from paged_jax.cli import progress


class Row(NamedTuple):
  """A question, and how a script answers it; `benchmarks/headlines.toml` has them all."""

  script: str
  question: str
  value: str  # format string over the script's JSON
  results: str = ""  # how the names of its recorded runs begin; by default as the script's
  readme: bool = False

  def answer(self, found: dict[str, Any]) -> str:
    """The answer in a script's JSON, "" if it is not there.

    >>> Row("allocator", "How flat?", "{flatness:.1f}").answer({"flatness": 1.57})
    '1.6'
    """
    try:
      return self.value.format_map(found)
    except (KeyError, IndexError, TypeError):  # another version's JSON, or a part that was not run
      return ""

  def recorded(self, folder: Path) -> dict[str, str]:
    """The newest recorded answer for each series of jax, "0.10" for instance."""
    files = sorted(folder.glob(f"results/{self.results or self.script}-*.json"))
    runs = sorted((json.loads(file.read_text()) for file in files), key=lambda run: run["date"])
    return {
      ".".join(run["where"]["jax"].split(".")[:2]): answer
      for run in runs
      if (answer := self.answer(run))
    }


def run(
  names: Annotated[
    list[str] | None, typer.Argument(help="Scripts to run; default: those that README shows.")
  ] = None,
  show_list: Annotated[bool, typer.Option("--list", help="Show the scripts, run none.")] = False,
  folder: Annotated[
    Path | None, typer.Option(help="A checkout of the source; default: where the package is.")
  ] = None,
) -> None:
  """Runs benchmarks, and shows their answers beside those of recorded runs."""
  folder = (folder or Path(paged_jax.__file__).parents[1]) / "benchmarks"
  if not (folder / "headlines.toml").is_file():
    raise ValueError(
      f"there is no {folder / 'headlines.toml'}: the benchmarks are in the source, not in the"
      " installed package; get it with git clone and name its folder with --folder"
    )
  every = rows(folder)
  scripts = dict.fromkeys(row.script for row in every)
  if show_list:
    for script in scripts:
      print(f"{script:<16}{_purpose(folder / f'{script}.py')}")
    return
  names = names or [*dict.fromkeys(row.script for row in every if row.readme)]
  if unknown := [name for name in names if name not in scripts]:
    raise ValueError(f"there is no benchmark named {unknown[0]!r}; --list shows them")
  failed = False
  for number, name in enumerate(names, start=1):
    with progress.status(f"running {name}.py ({number} of {len(names)})"):
      found, error = _found(folder / f"{name}.py")
    if error:
      failed = True
      progress.say(f"{name}.py failed: {error}")
    else:
      mine = [row for row in every if row.script == name]
      rich.console.Console().print(_table(folder, name, mine, found))
  if failed:
    raise typer.Exit(1)


def rows(folder: Path) -> list[Row]:
  """The rows of `headlines.toml`."""
  return [Row(**row) for row in tomllib.loads((folder / "headlines.toml").read_text())["row"]]


def series(folder: Path, rows: list[Row]) -> list[str]:
  """The series of jax with which some row has a recorded answer, oldest first."""
  names = {name for row in rows for name in row.recorded(folder)}
  return sorted(names, key=lambda name: [*map(int, name.split("."))])


def _found(script: Path) -> tuple[dict[str, Any], str]:
  """The JSON of a run, and why there is none."""
  with tempfile.TemporaryDirectory() as pictures:
    command = [sys.executable, str(script.resolve()), "--json"]
    done = subprocess.run(command, cwd=pictures, capture_output=True, text=True, check=False)
  if done.returncode:
    return {}, next(reversed(done.stderr.splitlines()), f"exit code {done.returncode}")
  return json.loads(done.stdout.splitlines()[-1]), ""


def _table(folder: Path, title: str, rows: list[Row], found: dict[str, Any]) -> rich.table.Table:
  names = series(folder, rows)
  table = rich.table.Table(title=title, title_justify="left", show_lines=True)
  for heading in ("question", "here", *(f"jax {name}, recorded" for name in names)):
    table.add_column(heading)
  for row in rows:
    recorded = row.recorded(folder)
    answers = (row.answer(found), *(recorded.get(name, "") for name in names))
    table.add_row(*(rich.text.Text(text) for text in (row.question, *answers)))
  return table


def _purpose(script: Path) -> str:
  """The first line of a script's docstring."""
  return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n")[0]
