"""Every example that people read is run: docstrings, and the README's."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import paged_jax

README = pathlib.Path(__file__).parent.parent / "README.md"
MODULES = [
  module.name for module in pkgutil.walk_packages(paged_jax.__path__, "paged_jax.")
  if not module.name.endswith("__main__")
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
  module = importlib.import_module(name)
  result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
  assert result.failed == 0


def test_public_names_have_docstrings():
  for name, value in vars(paged_jax).items():
    if not name.startswith("_") and getattr(value, "__module__", "").startswith("paged_jax"):
      assert value.__doc__, name


def test_the_readme_example_runs():
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  assert blocks
  space = {}
  for block in blocks:
    exec(block, space)
