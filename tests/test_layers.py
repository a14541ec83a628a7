"""Imports go down only, between folders and inside each; the core needs only jax."""

import ast
import dataclasses
import graphlib
import pathlib
import subprocess
import sys

import pytest

import paged_jax

ROOT = pathlib.Path(paged_jax.__file__).parent
# A table per folder. A module imports from the rows below its own, never from its own row.
TABLES = {
  "paged_jax": """
    __main__
    cli
    server
    engine viz
    host models testing
    __init__
    jitted sharding
    images
    cache
    attention plans
    ledger pages
    types config arguments loops interrupts groups
    meshes quantization
  """,
  "paged_jax.ledger": """
    __init__
    on_host
    log
    growing laws
    book verbs
    pool tables
  """,
  "paged_jax.attention": """
    __init__ gpu hopper reference tpu xla
    blocks proof tpu_kernel tpu_limits tpu_write wgmma
    backend
    cases options softmax splits
  """,
  "paged_jax.models": """
    __init__
    loading
    decoder families
    caches layers placement
    config
    added_tokens pattern ropes tensors
    fields
  """,
  "paged_jax.testing": """
    replay
    __init__ strategies
    counting in_place invariants model
  """,
  "paged_jax.host": """
    __init__ metrics
    manager
    tensors
    forecast report sharing swap
    admission
    prefixes
    persistence sequences
    pools turn
    reclaim
    kept
    config prefix
    errors events eviction holds pressure records state store
  """,
  "paged_jax.engine": """
    __init__
    engine
    service
    handle
    audit branches delivery warming
    desk scheduler
    calls room
    config proofs queue
    device requests
    fingerprint prompts sampling text
  """,
  "paged_jax.engine.device": """
    program
    records
    __init__ beams drafts draws
  """,
  "paged_jax.server": """
    __init__
    application
    responses
    metrics requests
  """,
  "paged_jax.cli": """
    main
    bench demo doctor generate serve
    __init__ model programs progress
  """,
}


def name_of(path):
  parts = path.relative_to(ROOT.parent).with_suffix("").parts
  return ".".join(parts)  # a folder's own module is `folder.__init__`


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(path):
  """The modules that a file imports, in functions and for type checkers too."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    for name in names:
      parent = name.rpartition(".")[0]
      for known in (name, f"{name}.__init__", parent, f"{parent}.__init__"):
        if known in MODULES:
          yield known
          break


GRAPH = {name: sorted({*imports_of(path)} - {name}) for name, path in MODULES.items()}


def member(name, folder):
  """The module or folder in `folder` that `name` is or is in."""
  return name[len(folder) + 1 :].split(".")[0] if name.startswith(f"{folder}.") else None


def test_each_module_has_one_place_in_the_table_of_its_folder():
  assert set(TABLES) == {name.rpartition(".")[0] for name in MODULES}
  for folder, table in TABLES.items():
    members = {member(name, folder) for name in MODULES} - {None}
    assert sorted(table.split()) == sorted(members), folder


@pytest.mark.parametrize("folder", TABLES)
def test_imports_go_down(folder):
  rows = TABLES[folder].strip().splitlines()
  place = {each: number for number, row in enumerate(rows) for each in row.split()}
  wrong = []
  for name, imported in GRAPH.items():
    for other in imported:
      own, lower = member(name, folder), member(other, folder)
      if own and lower and own != lower and place[lower] <= place[own]:
        wrong.append(f"{name} imports {other}")
  assert not wrong


def test_no_modules_import_each_other_in_a_circle():
  graphlib.TopologicalSorter(GRAPH).prepare()


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


def test_only_the_pool_and_the_ledger_on_the_host_write_its_leaves():
  leaves = {field.name for field in dataclasses.fields(paged_jax.Pool)}
  for path in MODULES.values():
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    writes = [
      call.lineno
      for call in calls
      if ast.unparse(call.func) in ("dataclasses.replace", "Pool")
      and leaves & {keyword.arg for keyword in call.keywords}
    ]
    assert bool(writes) == (path.stem in ("pool", "book", "in_place")), (path, writes)
