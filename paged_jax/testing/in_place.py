"""Checks that a function updates its donated cache in place, without running it."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding

from paged_jax.types import Cache


def assert_in_place(fn: Callable, *args, factor: int = 8) -> None:
  """Raises `AssertionError` if `fn`, compiled with its cache donated, copies the page array.

  It compiles `fn` for the arguments as they are, and for a pool with `factor` times as many pages.
  The temporary memory of the programs must not grow with the pool: at most by 2% of it, which is
  room for the ledger's integers.

  Args:
    fn: A function of `args`, for instance a verb or a whole decode loop.
    *args: Its arguments, arrays or `jax.ShapeDtypeStruct`s; the first that holds a `Cache` is
      donated. Caches may carry leading batch axes, as under `vmap`.
    factor: How much larger the second pool is.

  Raises:
    ValueError: No argument holds a `Cache`.
    NotImplementedError: The backend does not say how much memory a program takes.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=64, num_rows=2, max_length=16)
  >>> pj.testing.assert_in_place(pj.trim, pj.init(config), jnp.array([3, 0]))
  """
  caches = [i for i, arg in enumerate(args) if _num_caches(arg)]
  if not caches:
    raise ValueError("args must contain a Cache")
  temp, size = [], []
  for scale in (1, factor):
    scaled = [_with_pages(arg, scale) for arg in args]
    compiled = jax.jit(fn, donate_argnums=caches[0]).lower(*scaled).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
      raise NotImplementedError(f"no memory analysis on {jax.default_backend()}")
    temp.append(analysis.temp_size_in_bytes)
    size.append(sum(_num_bytes(arg) for arg in scaled))
  growth, allowed = temp[1] - temp[0], 0.02 * (size[1] - size[0])
  assert growth <= allowed, (
    f"not in place: temporary memory grows by {growth} bytes when the pool grows by "
    f"{size[1] - size[0]}"
  )


def _is_cache(x) -> bool:
  return isinstance(x, Cache)


def _num_caches(arg) -> int:
  return sum(map(_is_cache, jax.tree.leaves(arg, is_leaf=_is_cache)))


def _num_bytes(arg) -> int:
  caches = filter(_is_cache, jax.tree.leaves(arg, is_leaf=_is_cache))
  arrays = jax.tree.leaves([cache.pages for cache in caches])
  return sum(x.size * x.dtype.itemsize for x in arrays)


def _with_pages(arg, scale: int):
  """`arg` as shapes, with `scale` times as many pages in its caches."""

  def grow(cache):
    def more(x, axis, size):
      shape = list(x.shape)
      shape[axis] = size
      return _shape(x, tuple(shape))

    pool = cache.ledger.pool
    n = pool.refcount.shape[-1] * scale
    pool = dataclasses.replace(
      pool,
      free=more(pool.free, -1, -(-n // 32)),
      refcount=more(pool.refcount, -1, n),
      holds=more(pool.holds, -1, n),
    )
    axes = dataclasses.replace(
      cache.pages, kv=-5, scales=None if cache.pages.scales is None else -4
    )
    pages = jax.tree.map(lambda x, axis: more(x, axis, n), cache.pages, axes)
    ledger = dataclasses.replace(cache.ledger, pool=pool)
    return jax.tree.map(_shape, Cache(ledger=ledger, pages=pages))

  return jax.tree.map(lambda x: grow(x) if _is_cache(x) else _shape(x), arg, is_leaf=_is_cache)


def _shape(x, shape: tuple[int, ...] | None = None):
  """`x` as a shape, or one of another shape; where it lies on a mesh is kept."""
  where = getattr(x, "sharding", None)
  where = where if isinstance(where, NamedSharding) else None
  return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, sharding=where)
