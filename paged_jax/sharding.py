"""Placement of a cache on a mesh: KV heads split, the ledger everywhere."""

import warnings

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_jax import cache as cache_lib
from paged_jax.config import CacheConfig
from paged_jax.types import Cache


def shardings(config: CacheConfig, mesh: Mesh, *, axis: str | None = None) -> Cache:
  """A cache of `NamedSharding`s: the H axis of the page array over `axis`, all else replicated.

  Attention and writes then need no collectives, and every device runs the same ledger. KV heads
  that the mesh axis does not divide are replicated, with a warning.

  Args:
    config: The cache.
    mesh: The mesh; its axes may be Auto or Explicit.
    axis: Name of the mesh axis, its last one by default.

  Returns:
    A pytree like the cache, for `jax.device_put`, `jit(..., out_shardings=)` or, as
    `specs(config, mesh)`, for `jax.shard_map`.

  >>> import jax, paged_jax
  >>> mesh = jax.make_mesh((1,), ("model",))
  >>> config = paged_jax.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=4, num_pages=8)
  >>> where = paged_jax.sharding.shardings(config, mesh)
  >>> where.pages.kv.spec[2]
  'model'
  >>> cache = jax.jit(paged_jax.init, static_argnums=0, out_shardings=where)(config)
  """
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs(config, mesh, axis=axis),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def specs(config: CacheConfig, mesh: Mesh, *, axis: str | None = None) -> Cache:
  """The same as `PartitionSpec`s."""
  axis = mesh.axis_names[-1] if axis is None else axis
  if axis not in mesh.axis_names:
    raise ValueError(f"axis must be one of {list(mesh.axis_names)}, got {axis!r}")
  ways = mesh.shape[axis]
  if config.num_kv_heads % ways:
    warnings.warn(
      f"{config.num_kv_heads} KV heads do not divide over {ways} devices of mesh axis {axis!r}: "
      "the pages are replicated",
      stacklevel=3,  # who called `shardings`
    )
    axis = None
  cache = jax.eval_shape(lambda: cache_lib.init(config))
  return jax.tree.map(
    lambda x: PartitionSpec(None, None, axis, None, None) if x.ndim == 5 else PartitionSpec(),
    cache,
  )
