"""Placement of a cache on a mesh: KV heads split, the ledger on every device."""

import dataclasses
import warnings
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_jax import cache as cache_lib
from paged_jax import groups, meshes
from paged_jax.config import CacheConfig
from paged_jax.types import Cache

Configs = CacheConfig | tuple[CacheConfig, ...]


def shardings(config: Configs, mesh: Mesh, *, axis: str | None = None) -> Any:
  """A cache of `NamedSharding`s: the head axis of the page array, and of its scales, over `axis`; all else
  replicated.

  Attention and writes then need no collectives, and every device runs the same ledger. If the size
  of the mesh axis does not divide the KV heads, they are replicated, with a warning.

  Args:
    config: The cache, or a tuple of those of several groups: then so is the result.
    mesh: The mesh; its axes may be Auto or Explicit.
    axis: Name of a mesh axis, the last one by default.

  Returns:
    A pytree like the cache, for `jax.device_put`, `jit(..., out_shardings=)` or, as
    `specs(config, mesh)`, for `jax.shard_map`.

  Raises:
    ValueError: The mesh has no such axis.

  >>> import jax, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> where = pj.sharding.shardings(config, jax.make_mesh((1,), ("model",)))
  >>> cache = jax.jit(pj.init, static_argnums=0, out_shardings=where)(config)
  >>> cache.pages.kv.sharding.spec[2]
  'model'
  """
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs(config, mesh, axis=axis),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def split(config: Configs, mesh: Mesh, *, axis: str | None = None) -> Any:
  """The config, or each of a tuple, of a cache whose KV heads are split over a mesh.

  `init`, `Manager` and `Engine` make such a cache with each part on its device. Its verbs run in
  plain programs: `write` and `attend` work on every device's heads alone, and nothing communicates.
  If there are fewer heads than devices, or these do not divide them, each head is kept several
  times, as often as needed and never more (1 head over 4 devices: once on each).

  Args:
    config: The cache, or a tuple of those of several groups.
    mesh: The mesh; its axes may be Auto or Explicit. It may span processes.
    axis: Name of a mesh axis, the last one by default.

  Raises:
    ValueError: The mesh has no such axis.

  >>> import jax, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache = pj.init(pj.sharding.split(config, jax.make_mesh((1,), ("model",))))
  >>> cache.pages.kv.sharding.spec[2]
  'model'
  """
  made = [
    dataclasses.replace(each, split=meshes.split(mesh, axis, each.num_kv_heads))
    for each in groups.each(config)
  ]
  return groups.like(config, made)


def specs(config: Configs, mesh: Mesh, *, axis: str | None = None) -> Any:
  """The same as `PartitionSpec`s.

  >>> import jax, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> pj.sharding.specs(config, jax.make_mesh((1,), ("model",))).pages.kv[2]
  'model'
  """
  axis = meshes.axis_name(mesh, axis)
  ways, made = mesh.shape[axis], []
  for each in groups.each(config):
    split = axis
    if each.array_kv_heads % ways:
      warnings.warn(
        f"{each.array_kv_heads} KV heads do not divide over {ways} devices of mesh axis {axis!r}: "
        "the pages are replicated",
        stacklevel=3,  # the caller of `shardings`
      )
      split = None
    made.append(_specs(each, split))
  return groups.like(config, made)


def _specs(config: CacheConfig, axis: str | None) -> Cache:
  """The specs of one cache, whose KV heads are split over `axis`."""
  cache = jax.eval_shape(lambda: cache_lib.init(config))
  by_head = (
    PartitionSpec(None, None, axis, *[None] * (x.ndim - 3)) for x in jax.tree.leaves(cache.pages)
  )
  ledger = jax.tree.map(lambda x: PartitionSpec(), cache.ledger)
  return Cache(ledger, jax.tree.unflatten(jax.tree.structure(cache.pages), by_head))
