"""Writes each notebook's .ipynb, outputs included, from its .py: `python notebooks/render.py`."""

import pathlib

import jupytext
import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent


def execute(notebook: nbformat.NotebookNode, folder: pathlib.Path) -> None:
  """Runs all cells in a fresh kernel that works in `folder`."""
  nbclient.NotebookClient(
    notebook,
    kernel_name="python3",
    timeout=120,
    record_timing=False,
    resources={"metadata": {"path": str(folder)}},
  ).execute()


if __name__ == "__main__":
  for path in HERE.glob("[a-z]*.py"):
    if path.name != "render.py":
      notebook = jupytext.read(path)
