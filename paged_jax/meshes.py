"""KV heads over the axis of a mesh: where arrays lie, and functions that run on each part alone.

# heads      0 1 2 3 4 5 6 7       8 heads over 4 devices
# devices   [0 1][2 3][4 5][6 7]

# heads      0 1                   2 heads over 4 devices: each is kept twice
# devices   [0][0][1][1]
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Arrays = TypeVar("Arrays")


class Split(NamedTuple):
  """How the KV heads of a cache are split."""

  mesh: Mesh
  axis: str  # of the mesh
  repeats: int  # how often each head is kept, so that every device has one

  @property
  def ways(self) -> int:
    """Parts of the heads."""
    return self.mesh.shape[self.axis]

  def spec(self, before: int) -> PartitionSpec:
    """That of an array whose heads are behind `before` other axes."""
    return PartitionSpec(*[None] * before, self.axis)


def split(mesh: Mesh, axis: str | None, num_kv_heads: int) -> Split:
  """KV heads over `axis` of a mesh, the last one by default.

  Raises:
    ValueError: The mesh has no such axis.
  """
  name = axis_name(mesh, axis)
  return Split(mesh, name, math.lcm(num_kv_heads, mesh.shape[name]) // num_kv_heads)


def axis_name(mesh: Mesh, axis: str | None) -> str:
  """The axis of the mesh, the last one by default.

  Raises:
    ValueError: The mesh has no such axis.
  """
  name = mesh.axis_names[-1] if axis is None else axis
  if name not in mesh.axis_names:
    raise ValueError(f"axis must be one of {list(mesh.axis_names)}, got {axis!r}")
  return name


def check_auto(mesh: Mesh) -> None:
  """Raises unless the compiler may split arrays over all axes of the mesh.

  Raises:
    ValueError: An axis is not Auto; the message names it.
  """
  for name, kind in zip(mesh.axis_names, mesh.axis_types):
    if kind != AxisType.Auto:
      raise ValueError(f"mesh must have Auto axes, got {kind} for {name!r}")


def place(arrays: Arrays, mesh: Mesh, spec: PartitionSpec) -> Arrays:
  """The arrays, laid over the mesh as `spec` says; inside and outside of programs."""
  where = NamedSharding(mesh, spec)
  explicit = AxisType.Explicit in mesh.axis_types
  put = jax.device_put if explicit else jax.lax.with_sharding_constraint
  return jax.tree.map(lambda x: put(x, where), arrays)


def on_each(split: Split, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """`function` on every device's part of the heads, without any communication."""
  return jax.shard_map(
    function, mesh=split.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
