"""Runs a history on a cache, on a host ledger and on the plain-Python model, compared after every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import cache as cache_lib
from paged_jax import jitted
from paged_jax.config import CacheConfig
from paged_jax.ledger import HostLedger
from paged_jax.testing import invariants, strategies
from paged_jax.testing.model import Model
from paged_jax.types import Cache, Info, Ledger, Pages


def check(config: CacheConfig, history: list[strategies.Step], verbs=jitted) -> Cache:
  """Returns the last cache; raises `AssertionError` at the first step where any two of them differ.

  After every step free pages are filled with NaN, so that a read of one shows.

  Args:
    config: The cache to run on.
    history: Steps, as drawn by `strategies.histories`.
    verbs: A module or namespace with the verbs under their public names.
  """
  cache, host, model = verbs.init(config), HostLedger(config), Model(config)
  images, model_images = strategies.Images(), strategies.Images()
  host_images: list[tuple[int, int]] = []
  for step in history:
    if step.verb == "extend":
      counts, wanted = np.asarray(step.operands[0], np.int32), model.pages_needed(*step.operands)
      for needed in (verbs.pages_needed(cache, counts), host.pages_needed(counts)):
        np.testing.assert_array_equal(needed, wanted, f"needs of {step}")
    cache, ok, pages = _apply(verbs, config, cache, images, step)
    model_ok = strategies.apply(model, model_images, step)
    if step.verb == "restore":
      model_pages, model_ok = model_ok
      np.testing.assert_array_equal(pages, model_pages, f"pages of {step}")
    if step.verb == "offload":
      _compare_images(config, images.pages, model_images.pages)
    np.testing.assert_array_equal(ok, model_ok, f"ok of {step}")
    if step.verb not in ("write", "offload"):  # they change no ledger
      host_pages, info = on_host(host, host_images, step)
      np.testing.assert_array_equal(info.ok, ok, f"ok of {step} on the host")
      if step.verb == "restore":
        np.testing.assert_array_equal(host_pages, pages, f"pages of {step} on the host")
    same(host.snapshot(), cache.ledger)
    cache = poison(cache)
    compare(cache, model)
  return cache


def on_host(
  ledger: HostLedger, images: list[tuple[int, int]], step: strategies.Step
) -> tuple[np.ndarray | None, Info]:
  """Runs a step on a host ledger: the pages that it took for the host, and its report.

  Args:
    ledger: The ledger.
    images: Start and length of each row that `swap_out` took, for `swap_in`.
    step: Any step that changes a ledger.
  """
  if step.verb == "restore":
    chosen, count = step.operands
    return ledger.take_held(np.array(count), size=len(chosen))
  if step.verb == "swap_out":
    known = np.arange(ledger.num_rows) == step.operands[0]
    known &= ledger.lengths > 0
    images += zip(ledger.starts[known].tolist(), ledger.lengths[known].tolist())
    return None, ledger.free(known)._replace(ok=known.any())
  if step.verb == "swap_in":
    row, index = step.operands
    start, length = images[index]
    vacant = row in range(ledger.num_rows) and ledger.lengths[row] == 0
    count = -(-length // ledger.page_size) - start // ledger.page_size
    pages, info = ledger.take_held(np.array(count if vacant else -1), size=ledger.pages_per_row)
    if info.ok:
      images.pop(index)
      # The holds go at once, so that no page stays shared and `copy_on_write` does not matter.
      copy_on_write, ledger.copy_on_write = ledger.copy_on_write, True
      ledger.adopt(np.array([row]), pages[None], np.array([length]), np.array([start]))
      ledger.copy_on_write = copy_on_write
      ledger.drop(pages)
    return pages, info
  return None, getattr(ledger, step.verb)(*_arrays(step))


def same(one: Ledger, other: Ledger) -> None:
  """Raises unless two ledgers are equal bit for bit, dtypes and sizes too."""
  assert (one.page_size, one.copy_on_write) == (other.page_size, other.copy_on_write)
  for (path, x), y in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), jax.tree_util.keystr(path)
    np.testing.assert_array_equal(x, y, jax.tree_util.keystr(path))


def compare_ledger(ledger: Ledger, model: Model) -> None:
  """Raises unless every integer of the ledger is the model's."""
  n = model.num_pages
  tables, pool = ledger.tables, ledger.pool
  block_tables = np.full(tables.block_tables.shape, n)
  for r, row in enumerate(model.rows):
    for column, page in row.pages.items():
      block_tables[r, column] = page
  np.testing.assert_array_equal(tables.block_tables, block_tables, "block_tables")
  np.testing.assert_array_equal(tables.lengths, [row.length for row in model.rows], "lengths")
  np.testing.assert_array_equal(tables.starts, [row.start for row in model.rows], "starts")
  refcount = [model.refcount(page) for page in range(n)]
  np.testing.assert_array_equal(pool.refcount, refcount, "refcount")
  bits = np.unpackbits(np.asarray(pool.free).view(np.uint8), bitorder="little")
  free = [page < n and refcount[page] == 0 for page in range(bits.size)]
  np.testing.assert_array_equal(bits, free, "free")
  np.testing.assert_array_equal(pool.holds, model.holds, "holds")
  np.testing.assert_array_equal(pool.cursor, model.cursor, "cursor")
  np.testing.assert_array_equal(pool.num_free, model.num_free(), "num_free")


def compare(cache: Cache, model: Model) -> None:
  """Raises unless every integer of the cache, and every token it reads back, is the model's."""
  invariants.check(cache)
  compare_ledger(cache.ledger, model)

  tokens = np.zeros((len(model.rows), model.capacity), np.int32)
  for r, row in enumerate(model.rows):
    live = row.tokens[row.start : row.length]
    tokens[r, row.start : row.length] = [0 if token is None else token for token in live]
  rows = jnp.arange(len(model.rows), dtype=jnp.int32)
  for layer in range(cache.pages.kv.shape[1]):
    k, v = _gather(cache, jnp.int32(layer), rows)
    shape = (*tokens.shape, *k.shape[2:])
    wanted = keys_and_values(tokens.reshape(-1), layer, shape[2:], cache.pages.value_dim)
    wanted_k, wanted_v = (x.reshape(shape) for x in (wanted[0], wanted[-1]))
    np.testing.assert_array_equal(k, wanted_k, f"keys of layer {layer}")
    np.testing.assert_array_equal(v, wanted_v[..., : v.shape[-1]], f"values of layer {layer}")


def keys_and_values(
  tokens, layer: int, shape: tuple[int, int], value_dim: int | None
) -> list[np.ndarray]:
  """What is stored of `tokens` [B] in a layer: K and V f32[B,H,D], or K alone if it contains V."""
  return [values(tokens, x, shape) for x in ((layer, ~layer) if value_dim is None else (layer,))]


def values(tokens, layer: int, shape: tuple[int, int]) -> np.ndarray:
  """The values of `tokens` [B] in a layer (`~layer` for V): float32 [B,H,D], exact in 16 bits."""
  own = np.asarray(tokens, np.float32)[:, None, None] * np.ones(shape, np.float32)
  signs = 1 - 2 * ((np.arange(shape[0])[:, None] + np.arange(shape[1]) + layer) % 2)
  return own * signs * (1.0 if layer >= 0 else 0.5)


@jax.jit
def poison(cache: Cache) -> Cache:
  """The cache with NaN in every page that nobody holds."""
  free = (cache.ledger.pool.refcount == 0)[:, None, None, None, None]
  nan = jax.lax.bitcast_convert_type(jnp.full((), jnp.nan, cache.pages.dtype), cache.pages.kv.dtype)
  kv = jnp.where(free, nan, cache.pages.kv)
  return dataclasses.replace(cache, pages=dataclasses.replace(cache.pages, kv=kv))


_gather = jax.jit(cache_lib.gather)


def _apply(
  verbs, config: CacheConfig, cache: Cache, images: strategies.Images, step: strategies.Step
):
  """The next cache, ok, and the pages that `restore` took."""
  verb = getattr(verbs, step.verb)
  arrays = _arrays(step)
  pages = None
  if step.verb == "write":
    plan = verbs.plan(cache, *arrays[:2])
    for layer in range(config.num_layers):
      shape = (config.num_kv_heads, config.head_dim)
      k, *v = keys_and_values(arrays[2], layer, shape, config.value_dim)
      cache = verbs.write(cache, jnp.int32(layer), k, v[0] if v else None, plan)
    return cache, plan.ok, pages
  if step.verb == "offload":
    images.pages += verbs.offload(cache, *arrays)
    return cache, True, pages
  if step.verb == "restore":
    chosen = tuple(images.pages[i] for i in step.operands[0])
    cache, pages, info = verbs.restore(cache, chosen, jnp.int32(step.operands[1]))
  elif step.verb == "swap_out":
    cache, image, info = verbs.swap_out(cache, jnp.int32(step.operands[0]))
    if info.ok:
      images.rows.append(image)
  elif step.verb == "swap_in":
    row, index = step.operands
    cache, info = verbs.swap_in(cache, jnp.int32(row), images.rows[index])
    if info.ok:
      images.rows.pop(index)
  else:
    cache, info = verb(cache, *arrays)
  np.testing.assert_array_equal(info.num_free, cache.num_free, "info.num_free")
  return cache, info.ok, pages


def _arrays(step: strategies.Step) -> list[np.ndarray]:
  return [np.asarray(x, bool if x and isinstance(x[0], bool) else np.int32)
          for x in step.operands if isinstance(x, list)]  # fmt: skip


def _compare_images(config: CacheConfig, images: list[Pages], contents: list[list]) -> None:
  """Raises unless each image has the bytes of the tokens that the model's has."""
  shape = (config.num_kv_heads, config.head_dim)
  for image, content in zip(images, contents, strict=True):
    tokens = [0 if token is None else token for token in content]
    kv = np.asarray(image.kv).view(config.dtype)  # [L,H,T,2D], or [L,H,T,D] of keys alone
    padding = (0, 0), (0, 0), (0, config.array_head_dim - config.head_dim)
    for layer in range(config.num_layers):
      kept = keys_and_values(tokens, layer, shape, config.value_dim)
      wanted = np.concatenate([np.pad(x.transpose(1, 0, 2), padding) for x in kept], axis=-1)
      np.testing.assert_array_equal(kv[layer], wanted, f"image {content}")
