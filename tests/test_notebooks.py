"""The notebooks run, and the two files of each pair say the same."""

import pathlib
import runpy

import jupytext
import nbformat
import pytest

import paged_jax

render = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "notebooks" / "render.py"))
SOURCES = pytest.mark.parametrize("source", render["SOURCES"], ids=lambda path: path.stem)


def pictures(notebook):
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
  assert not [output for output in outputs if output.output_type == "error"]
  return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.once
@pytest.mark.timeout(180)  # a process that compiles all its programs, and trains
@SOURCES
def test_notebook_runs_without_errors(source, tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(paged_jax.__file__).parent.parent))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nobody's startup files
  monkeypatch.setenv("PAGED_JAX_NOTEBOOK_STEPS", "4")
  monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
  notebook = render["execute"](source)
  assert pictures(notebook) == pictures(nbformat.read(source.with_suffix(".ipynb"), 4))


@SOURCES
def test_pair_has_the_same_cells(source):
  def cells(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]

  committed = nbformat.read(source.with_suffix(".ipynb"), 4)
  assert cells(committed) == cells(jupytext.read(source))
  assert pictures(committed) > 0
