"""Writes each notebook's .ipynb, with its outputs, from the .py: `python notebooks/render.py`."""

import pathlib
import tempfile

import jupytext
import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path.name != pathlib.Path(__file__).name)


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook written in `path`, all its cells run by a fresh kernel in an empty folder."""
  notebook = jupytext.read(path)
  for index, cell in enumerate(notebook.cells):
    cell.id = f"cell-{index}"  # the same from one rendering to the next
  with tempfile.TemporaryDirectory() as folder:
    nbclient.NotebookClient(
      notebook,
      kernel_name="python3",
      timeout=120,
      record_timing=False,
      resources={"metadata": {"path": folder}},
    ).execute()
  notebook.metadata.pop("language_info", None)  # it names the interpreter's exact version
  return notebook


if __name__ == "__main__":
  for source in SOURCES:
    nbformat.write(execute(source), source.with_suffix(".ipynb"))
