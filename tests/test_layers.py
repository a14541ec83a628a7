"""Imports go down the layers only, siblings do not import each other, the core needs jax alone."""

import ast
import dataclasses
import pathlib
import subprocess
import sys

import pytest

import paged_jax

ROOT = pathlib.Path(paged_jax.__file__).parent
LAYERS = {
  "types": 0, "config": 0, "arguments": 0, "loops": 0, "interrupts": 0,
  "ledger": 1, "pages": 1,
  "attention": 2,
  "cache": 3,
  "jitted": 4, "sharding": 4,
  "testing": 5, "models": 5, "host": 5,
  "engine": 6, "viz": 6,
  "server": 7,
  "cli": 8,
}  # fmt: skip


def layer_of(path):
  return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == "paged_jax":
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paged_jax."):
      yield node.module.split(".")[1]


SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_layers(path):
  own = layer_of(path)
  assert own in LAYERS, f"{own} has no layer"
  for name in imported(ast.parse(path.read_text())):
    if name in LAYERS and name != own:
      assert LAYERS[name] < LAYERS[own], f"{own} imports {name}"


def test_the_core_imports_nothing_but_jax_and_numpy():
  program = """
import sys, jax, numpy
before = {name.split('.')[0] for name in sys.modules}
import paged_jax, paged_jax.testing
print(*({name.split('.')[0] for name in sys.modules} - before - {'paged_jax'}))
"""
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  extra = set(run.stdout.split()) - set(sys.stdlib_module_names)
  assert extra <= {"absl", "jaxlib", "ml_dtypes", "opt_einsum", "scipy", "etils"}, extra


def test_only_the_pool_and_its_twin_in_numpy_write_its_leaves():
  leaves = {field.name for field in dataclasses.fields(paged_jax.Pool)}
  for path in SOURCES:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    writes = [
      call.lineno
      for call in calls
      if ast.unparse(call.func) in ("dataclasses.replace", "Pool")
      and leaves & {keyword.arg for keyword in call.keywords}
    ]
    assert bool(writes) == (path.stem in ("pool", "on_host", "in_place")), (path, writes)
