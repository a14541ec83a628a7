"""Every example that people read is run: docstrings, and those of pages."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import paged_jax

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [
  module.name for module in pkgutil.walk_packages(paged_jax.__path__, "paged_jax.")
  if not module.name.endswith("__main__")
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
  module = importlib.import_module(name)
  result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
  assert result.failed == 0


@pytest.mark.parametrize(
  "page",
  [
    "README.md",
    *(f"docs/{x}.md" for x in ("engine", "groups", "eightbit", "meshes", "persistence")),
  ],
)
def test_examples_of_a_page_run(page):
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
  assert blocks
  space = {"__name__": "example"}
  for block in blocks:
    exec(block, space)
