"""Runs a history on a cache, on a host ledger and on the plain-Python model, compared after every step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from paged_jax import cache as cache_lib
from paged_jax import groups, jitted, quantization
from paged_jax.attention import cases
from paged_jax.config import CacheConfig
from paged_jax.ledger import HostLedger
from paged_jax.testing import invariants, strategies
from paged_jax.testing.model import Group, Model
from paged_jax.types import Cache, Info, Ledger, Pages, Plan

Configs = CacheConfig | tuple[CacheConfig, ...]


def check(config: Configs, history: list[strategies.Step], verbs=jitted) -> Any:
  """Returns the last cache; raises `AssertionError` at the first step where any two of them differ.

  After every step free pages are filled with NaN, so that a read of one shows.

  Args:
    config: The cache to run on, or a tuple of caches with the same rows.
    history: Steps, as drawn by `strategies.histories`.
    verbs: A module or namespace with the verbs under their public names.
  """
  cache, host, model = verbs.init(config), HostLedger(config), Model(config)
  images, model_images = (strategies.Images(model.several) for _ in range(2))
  host_images: list = []
  for step in history:
    if step.verb == "extend":
      counts, wanted = np.asarray(step.operands[0], np.int32), model.pages_needed(*step.operands)
      for needed in (verbs.pages_needed(cache, counts), host.pages_needed(counts)):
        _equal(needed, wanted, f"needs of {step}")
    cache, ok, pages = _apply(verbs, config, cache, images, step)
    model_ok = strategies.apply(model, model_images, step)
    if step.verb == "restore":
      model_pages, model_ok = model_ok
      _equal(pages, model_pages, f"pages of {step}")
    if step.verb == "offload":
      _compare_images(config, images.pages, model_images.pages)
    _equal(ok, model_ok, f"ok of {step}")
    if step.verb not in ("write", "offload"):  # they change no ledger
      host_pages, info = on_host(host, host_images, step)
      _equal(info.ok, ok, f"ok of {step} on the host")
      if step.verb == "restore":
        _equal(host_pages, pages, f"pages of {step} on the host")
    for one, other in zip(groups.each(host.snapshot()), groups.each(cache), strict=True):
      same(one, other.ledger)
    cache = poison(cache)
    compare(cache, model)
  return cache


def on_host(ledger: HostLedger, images: list, step: strategies.Step) -> tuple[Any, Info]:
  """Runs a step on a host ledger: the pages that it took for the host, and its report.

  Args:
    ledger: The ledger.
    images: Starts and length of each row that `swap_out` took, for `swap_in`.
    step: Any step that changes a ledger.
  """
  if step.verb == "restore":
    chosen, count = step.operands
    sizes = groups.like(count, [len(chosen) for _ in ledger.groups])
    return ledger.take_held(_mapped(np.array, count), sizes)
  if step.verb == "swap_out":
    known = np.arange(ledger.num_rows) == step.operands[0]
    known &= ledger.lengths > 0
    for row in known.nonzero()[0]:
      images.append(([int(book.starts[row]) for book in ledger.groups], int(ledger.lengths[row])))
    return None, ledger.free(known)._replace(ok=known.any())
  if step.verb == "swap_in":
    return _swapped_in(ledger, images, *step.operands)
  return None, getattr(ledger, step.verb)(*_arrays(step))


def _swapped_in(ledger: HostLedger, images: list, row: int, index: int) -> tuple[Any, Info]:
  """`swap_in` on a host ledger: pages for the host, which the row shares, and then has alone."""
  starts, length = images[index]
  whole = ledger.snapshot()
  vacant = row in range(ledger.num_rows) and ledger.lengths[row] == 0
  counts, sizes = [], []
  for book, start in zip(ledger.groups, starts):
    count = -(-length // book.page_size) - start // book.page_size
    counts.append(np.array(count if vacant else -1))
    sizes.append(book.pages_per_row)
  pages, info = ledger.take_held(groups.like(whole, counts), groups.like(whole, sizes))
  if info.ok:
    images.pop(index)
    # The holds go at once, so that no page stays shared and `copy_on_write` does not matter.
    copy_on_write = ledger.copy_on_write
    _set_copy_on_write(ledger, True)
    lists = _mapped(lambda own: own[None], pages)
    begins = groups.like(whole, [np.array([start]) for start in starts])
    ledger.adopt(np.array([row]), lists, np.array([length]), begins)
    _set_copy_on_write(ledger, copy_on_write)
    ledger.drop(pages)
  return pages, info


def _set_copy_on_write(ledger: HostLedger, value: bool) -> None:
  for each in (ledger, *ledger.groups):
    each.copy_on_write = value


def _mapped(function, value: Any) -> Any:
  """`function` of the value of each group."""
  return groups.like(value, [function(each) for each in groups.each(value)])


def _equal(got: Any, wanted: Any, message: str) -> None:
  """Raises unless the values of all groups are equal."""
  for one, other in zip(groups.each(got), groups.each(wanted), strict=True):
    np.testing.assert_array_equal(one, other, message)


def same(one: Ledger, other: Ledger) -> None:
  """Raises unless two ledgers are equal bit for bit, dtypes and sizes too."""
  statics = [(x.page_size, x.copy_on_write, x.window) for x in (one, other)]
  assert statics[0] == statics[1]
  for (path, x), y in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), jax.tree_util.keystr(path)
    np.testing.assert_array_equal(x, y, jax.tree_util.keystr(path))


def compare_ledger(ledger: Any, model: Model) -> None:
  """Raises unless every integer of the ledger, or of each group, is the model's."""
  for each, group in zip(groups.each(ledger), model.groups, strict=True):
    _compare_group(each, group)


def _compare_group(ledger: Ledger, model: Group) -> None:
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


def compare(cache: Any, model: Model) -> None:
  """Raises unless every integer of the cache, and every token it reads back, is the model's."""
  caches = groups.each(cache)
  invariants.check(cache)
  compare_ledger(groups.like(cache, [each.ledger for each in caches]), model)
  for each, group in zip(caches, model.groups):
    _compare_tokens(each, group)


def _compare_tokens(cache: Cache, model: Group) -> None:
  tokens = np.zeros((len(model.rows), model.capacity), np.int32)
  for r, row in enumerate(model.rows):
    live = row.tokens[row.start : row.length]
    tokens[r, row.start : row.length] = [0 if token is None else token for token in live]
  rows = jnp.arange(len(model.rows), dtype=jnp.int32)
  for layer in range(cache.pages.kv.shape[1]):
    k, v = _gather(cache, jnp.int32(layer), rows)
    shape = (*tokens.shape, *k.shape[2:])
    wanted = keys_and_values(
      tokens.reshape(-1), layer, shape[2:], cache.pages.value_dim, cache.pages.dtype
    )
    wanted_k, wanted_v = (x.reshape(shape) for x in (wanted[0], wanted[-1]))
    np.testing.assert_array_equal(k, wanted_k, f"keys of layer {layer}")
    np.testing.assert_array_equal(v, wanted_v[..., : v.shape[-1]], f"values of layer {layer}")


def keys_and_values(
  tokens, layer: int, shape: tuple[int, int], value_dim: int | None, dtype: DTypeLike = np.float32
) -> list[np.ndarray]:
  """Of `tokens` [B] in a layer: K and V f32[B,H,D], or K alone if it contains V.

  What is written is that of float32, and what is read that of the pages' dtype.
  """
  written = [values(tokens, x, shape) for x in ((layer, ~layer) if value_dim is None else (layer,))]
  return [_read(x, np.dtype(dtype)) for x in written]


def _read(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """What pages of a dtype read of values that are exact in 16 bits."""
  if not quantization.quantized(dtype):
    return x
  numbers, scales = cases.quantized(np.where(x.any(axis=-1, keepdims=True), x, 1), dtype.name)
  return np.where(x == 0, 0, numbers.astype(np.float32) * scales[..., None])


def values(tokens, layer: int, shape: tuple[int, int]) -> np.ndarray:
  """The values of `tokens` [B] in a layer (`~layer` for V): float32 [B,H,D], exact in 16 bits.

  Even channels spell the token and odd ones another number, so that 8 bits need both the numbers
  and the scale of each.
  """
  tokens, channels = np.asarray(tokens, np.int64)[:, None, None], np.arange(shape[1])
  own = np.where(channels % 2, tokens * 37 % 251, tokens)
  signs = 1 - 2 * ((np.arange(shape[0])[:, None] + channels + layer) % 2)
  return (own * signs).astype(np.float32) * (1.0 if layer >= 0 else 0.5)


@jax.jit
def poison(cache: Any) -> Any:
  """The cache, or each of a tuple, with NaN in every page that nobody holds."""
  return _mapped(_poisoned, cache)


def _poisoned(cache: Cache) -> Cache:
  pages, free = cache.pages, cache.ledger.pool.refcount == 0
  worst = 127 if pages.dtype == np.int8 else np.nan
  worst = jnp.asarray(np.array(worst, pages.dtype).view(pages.kv.dtype))
  kv = jnp.where(free[:, None, None, None, None], worst, pages.kv)
  scales = pages.scales
  if scales is not None:
    scales = jnp.where(free[:, None, None, None], jnp.nan, scales)
  return dataclasses.replace(cache, pages=dataclasses.replace(pages, kv=kv, scales=scales))


_gather = jax.jit(cache_lib.gather)


def _apply(verbs, config: Configs, cache: Any, images: strategies.Images, step: strategies.Step):
  """The next cache, ok, and the pages that `restore` took."""
  verb = getattr(verbs, step.verb)
  arrays = _arrays(step)
  pages = None
  if step.verb == "write":
    plan = verbs.plan(cache, *arrays[:2])
    written = [
      _written(verbs, *each, arrays[2])
      for each in zip(groups.each(config), groups.each(cache), groups.each(plan))
    ]
    return groups.like(cache, written), groups.each(plan)[0].ok, pages
  if step.verb == "offload":
    images.keep(verbs.offload(cache, *arrays))
    return cache, True, pages
  if step.verb == "restore":
    chosen, count = step.operands
    cache, pages, info = verbs.restore(cache, images.chosen(chosen), _mapped(jnp.int32, count))
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
  _equal(info.num_free, _mapped(lambda each: each.num_free, cache), "info.num_free")
  return cache, info.ok, pages


def _written(verbs, config: CacheConfig, cache: Cache, plan: Plan, tokens: np.ndarray) -> Cache:
  """The cache with tokens in every layer."""
  for layer in range(config.num_layers):
    shape = (config.num_kv_heads, config.head_dim)
    k, *v = keys_and_values(tokens, layer, shape, config.value_dim)
    cache = verbs.write(cache, jnp.int32(layer), k, v[0] if v else None, plan)
  return cache


def _arrays(step: strategies.Step) -> list:
  """The lists among the operands of a step as arrays."""
  return [_mapped(_array, x) for x in step.operands if isinstance(x, list | tuple)]


def _array(values: list | int) -> np.ndarray:
  array = np.asarray(values)
  return array if array.dtype == bool else array.astype(np.int32)


def _compare_images(config: Configs, images: list, contents: list) -> None:
  """Raises unless each image has the bytes of the tokens that the model's has."""
  for image, content in zip(images, contents, strict=True):
    parts = (groups.each(x) for x in (config, image, content))
    for each in zip(*parts, strict=True):
      _compare_image(*each)


def _compare_image(config: CacheConfig, image: Pages, content: list) -> None:
  shape = (config.num_kv_heads, config.head_dim)
  tokens = [0 if token is None else token for token in content]
  kv = np.asarray(image.kv).view(config.dtype)  # [L,H,T,2D], or [L,H,T,D] of keys alone
  if image.scales is not None:
    kv = cases.read(kv[None], np.asarray(image.scales)[None], config.dtype)[0]
  padding = (0, 0), (0, 0), (0, config.array_head_dim - config.head_dim)
  for layer in range(config.num_layers):
    kept = keys_and_values(tokens, layer, shape, config.value_dim, config.dtype)
    wanted = np.concatenate([np.pad(x.transpose(1, 0, 2), padding) for x in kept], axis=-1)
    np.testing.assert_array_equal(kv[layer], wanted, f"image {content}")
