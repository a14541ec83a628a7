"""The real TPU compiler, without a TPU: whole programs for v5e, v6e and others, ahead of time.

Needs the `libtpu` wheel. Import it before jax: it sets the environment that keeps libtpu from
looking for a device.
"""

import collections
import os
import pathlib
import re
import tempfile
import time

DUMPS = pathlib.Path(tempfile.mkdtemp(prefix="bundles-"))
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

# generation: topology and chips per host of one core, of four and of eight
_TOPOLOGIES = {
  "v5e": {1: ("1x1", (1, 1, 1)), 4: ("2x2", (2, 2, 1)), 8: ("2x4", (2, 2, 1))},
  "v6e": {1: ("1x1", (1, 1, 1)), 4: ("2x2", (2, 2, 1)), 8: ("2x4", (2, 2, 1))},
  "tpu7x": {1: ("1x1x1", (1, 1, 1)), 4: ("2x1x1", (2, 1, 1))},  # two cores per chip
}


def keep_bundles() -> None:
  """Makes the compiler write down its final instruction bundles. Call it before `cores`."""
  os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMPS} --xla_jf_dump_llo_text=true"


def cores(generation: str, count: int = 1) -> Mesh:
  """A mesh of one axis, "model", of one TensorCore, four or eight, which are not there."""
  topology, bounds = _TOPOLOGIES[generation][count]
  found = topologies.get_topology_desc(
    platform="tpu", topology_name=f"{generation}:{topology}", chips_per_host_bounds=bounds
  )
  return Mesh(np.array(found.devices[:count]), ("model",), axis_types=(AxisType.Auto,))


def shapes(mesh: Mesh, tree, specs=None):
  """The same arrays as shapes on the mesh, replicated or by `specs`."""
  if specs is None:
    specs = jax.tree.map(lambda _: PartitionSpec(), tree)
  return jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
    tree,
    specs,
  )


class Compiled:
  """What the compiler made of a program."""

  def __init__(self, mesh: Mesh, function, *args, donate: tuple[int, ...] = ()):
    for path in DUMPS.glob("*"):
      path.unlink()
    began = time.perf_counter()
    with jax.set_mesh(mesh):
      traced = jax.jit(function, donate_argnums=donate).trace(*args)
      self.compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    self.seconds = time.perf_counter() - began
    self.text = self.compiled.as_text()
    memory = self.compiled.memory_analysis()
    self.temp_bytes = memory.temp_size_in_bytes
    self.alias_bytes = memory.alias_size_in_bytes

  @property
  def aliased_outputs(self) -> set[int]:
    """Which outputs, counted through all leaves, are where a donated argument was."""
    header = self.text[self.text.index("input_output_alias=") :].splitlines()[0]
    return {int(output) for output in re.findall(r"\{(\d+)\}: \(\d+, \{\}", header)}

  @property
  def collectives(self) -> dict[str, int]:
    """How many of each collective there are."""
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return dict(collections.Counter(re.findall(rf" ({names})(?:-start)?\(", self.text)))

  def bundles(self, kernel: str, trips: int) -> int:
    """Bundles of one turn of the loop around the only kernel's main loop, and `trips` of that."""
    ((around, main),) = self.kernels(kernel)
    return around + trips * main

  def kernels(self, name: str) -> list[tuple[int, int]]:
    """Bundles around, and of one turn of, the main loop of each kernel of that name, as they come.

    The main loop is the one with most bundles; loops beside it are taken not to run. Needs
    `keep_bundles`.
    """
    found = []
    for loops in self.loops(name):
      main = max(range(len(loops)), key=lambda i: loops[i]["bundles"] if loops[i]["depth"] else 0)
      depth = loops[main]["depth"] - 1
      around = next(loop for loop in reversed(loops[:main]) if loop["depth"] == depth)
      found.append((around["bundles"], loops[main]["bundles"]))
    return found

  def loops(self, name: str) -> list[list[dict[str, int]]]:
    """The loops of each kernel of that name."""
    found = {}
    for path in DUMPS.glob("*final_bundles.txt"):
      if match := re.search(rf"-{name}\w*(?:\.(\d+))?-\d+-final", path.name):
        found[int(match[1] or 0)] = _loops(path)
    return [found[number] for number in sorted(found)]


def _loops(path: pathlib.Path) -> list[dict[str, int]]:
  """Depth, and bundles without inner loops, of each loop in program order; 0 is no loop."""
  top = {"depth": 0, "bundles": 0}
  stack, found = [top], [top]
  for line in path.read_text().splitlines():
    match = re.match(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2}):)?\s*:?\s*((?:> ?)*)\{", line)
    if not match:
      continue
    tag, depth = match[1], match[2].count(">")
    if "{}" in line and not depth:  # an empty bundle has no depth of its own
      stack[-1]["bundles"] += 1
      continue
    while len(stack) > 1 and stack[-1]["depth"] >= depth + (tag != "LB"):
      stack.pop()
    if tag == "LB":
      stack.append({"depth": depth, "bundles": 0})
      found.append(stack[-1])
    stack[-1]["bundles"] += 1
  return found
