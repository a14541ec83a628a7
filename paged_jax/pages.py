"""The page array: write, gather, copy, clear. Only this module and the kernels know its layout.

Axis letters: N pages, L layers, H KV heads, T tokens per page, D head dim as stored, B entries in a
call; `head_dim` is that of the values, at most D.

    # one token of one head   [k k k k k 0 0 0 | v v v v v 0 0 0]      head_dim 5, D 8
    # pages of keys only      [v v v k k 0 0 0]                        value_dim 3 of the key's 5

A page of 8 bits is numbers and scales: both arrays have the page first and the token fourth, so
whatever moves, clears or keeps tokens does the same to both.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from paged_jax import loops, meshes, quantization
from paged_jax.config import CacheConfig
from paged_jax.types import Copies, Pages


def init(config: CacheConfig) -> Pages:
  """An array of zero pages."""
  n, num_layers, t = config.num_pages, config.num_layers, config.page_size
  shape = n, num_layers, config.array_kv_heads, t, config.array_channels
  kv, scales = jnp.zeros(shape, config.array_dtype), None
  if config.num_scales:
    scales = jnp.zeros((n, num_layers, config.num_scales, t), jnp.float32)
  dims = config.head_dim, config.value_dim
  return placed(Pages(kv, np.dtype(config.dtype), *dims, scales, config.split))


def placed(pages: Pages) -> Pages:
  """The pages, each part of their heads on its device if they are split."""
  split = pages.split
  return pages if split is None else meshes.place(pages, split.mesh, split.spec(2))


def num_kv_heads(pages: Pages) -> int:
  """KV heads as callers see them."""
  return pages.kv.shape[2] // (1 if pages.split is None else pages.split.repeats)


def repeated(x: jax.Array, pages: Pages) -> jax.Array:
  """`x` [B,heads,...] of the caller's KV heads with as many as pages have, [B,H,...]."""
  more = 1 if pages.split is None else pages.split.repeats
  return x if more == 1 else jnp.repeat(x, more, axis=1)


def sizes(pages: Pages) -> tuple[int, int, int, int, int]:
  """N, L, H, T and D of the page array; callers' arrays have `pages.head_dim` in place of D."""
  n, num_layers, h, t, width = pages.kv.shape
  return n, num_layers, h, t, width // 2 if pages.value_dim is None else width


def layer_bytes(pages: Pages) -> int:
  """Bytes of one page in one layer, scales included."""
  return sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in jax.tree.leaves(pages))


def value_size(pages: Pages) -> int:
  """Channels of a value, as callers see it."""
  return pages.head_dim if pages.value_dim is None else pages.value_dim


def padded(x: jax.Array, pages: Pages) -> jax.Array:
  """`x` [..., head_dim] as wide as it is stored, [..., D]: zeros behind."""
  more = sizes(pages)[-1] - pages.head_dim
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def cropped(x: jax.Array, pages: Pages) -> jax.Array:
  """`x` [..., D or less] as wide as a value, without what is behind."""
  size = value_size(pages)
  return x if x.shape[-1] == size else x[..., :size]


def stored(
  k: jax.Array, v: jax.Array | None, pages: Pages
) -> tuple[list[jax.Array], jax.Array | None]:
  """What pages keep of keys and values [B,H,head_dim]; `v` is None if pages hold keys only.

  Returns:
    Bits in the array's dtype [B,H,D] of the keys, and of the values if there are any; and their
    scales f32[B,2H], None unless pages are of 8 bits.
  """
  given, scales = [x for x in (k, v) if x is not None], None
  if pages.scales is None:
    numbers = [x.astype(pages.dtype) for x in given]
  else:
    numbers, scales = zip(*(quantization.quantize(x, pages.dtype) for x in given))
    scales = jnp.stack(scales, axis=-1).reshape(k.shape[0], -1)
  return [_as(padded(x, pages), pages.kv.dtype) for x in numbers], scales


def values(bits: jax.Array, pages: Pages) -> jax.Array:
  """The numbers of `bits` of the page array, in the pages' dtype."""
  return _as(bits, pages.dtype)


def by_head(scales: jax.Array, pages: Pages) -> tuple[jax.Array, jax.Array]:
  """Scales of keys and of values [...,H,T], of those [...,2H,T] that pages have."""
  h = pages.kv.shape[2]
  each = scales.reshape(*scales.shape[:-2], h, -1, scales.shape[-1])
  return each[..., 0, :], each[..., -1, :]


def once(x: jax.Array, pages: Pages) -> jax.Array:
  """`x` [R,X,H,...] of the heads of pages, with each of the caller's KV heads once."""
  split = pages.split
  if split is None or split.repeats == 1:
    return x
  return meshes.place(x, split.mesh, PartitionSpec())[:, :, :: split.repeats]


def _as(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def write(
  pages: Pages, layer: jax.Array, k: jax.Array, v: jax.Array | None, slots: jax.Array
) -> Pages:
  """Writes `k`, `v` [B,H,head_dim] of one layer at distinct `slots` i32[B]; drops out of range.

  `v` is None if pages hold keys only.
  """
  t = pages.kv.shape[3]
  bits, scales = stored(k, v, pages)

  def put(x, new):
    return x.at[slots // t, layer, :, slots % t].set(new, mode="drop", unique_indices=True)

  new = dataclasses.replace(pages, kv=jnp.concatenate(bits, axis=-1), scales=scales)
  return jax.tree.map(put, pages, new)


def gather(pages: Pages, layer: jax.Array, tables: jax.Array) -> tuple[jax.Array, jax.Array]:
  """K and V [R,P*T,H,channels] of one layer by block `tables` i32[R,P], zero where no page is.

  In the pages' dtype; of 8-bit pages float32.
  """
  _, _, h, t, d = sizes(pages)
  r, p = tables.shape

  def in_order(x):
    """[R,P,H,T,...] as [R,P*T,H,...]."""
    return x.swapaxes(2, 3).reshape(r, p * t, h, *x.shape[4:])

  found = jax.tree.map(lambda x: x.at[tables, layer].get(mode="fill", fill_value=0), pages)
  kv = values(in_order(found.kv), pages)
  k, v = kv[..., : pages.head_dim], cropped(kv[..., d:] if pages.value_dim is None else kv, pages)
  if found.scales is None:
    return k, v
  scales = map(in_order, by_head(found.scales, pages))
  k, v = (quantization.dequantize(*each) for each in zip((k, v), scales))
  return k, v


def portable(image: Pages) -> dict[str, np.ndarray]:
  """The arrays of a page's image as any platform could keep them. Waits for the image.

  # stored     uint16   [k k k k k 0 0 0 | v v v v v 0 0 0]      head_dim 5, padded to 8
  # portable   bfloat16 [k k k k k v v v v v]
  """
  more = 1 if image.split is None else image.split.repeats  # each head once
  kv = np.asarray(image.kv).view(image.dtype)[:, ::more]
  kv = _by_part(kv, image)[..., : image.head_dim]
  arrays = {"kv": kv.reshape(*kv.shape[:-2], -1)}
  if image.scales is not None:
    num_layers, h, t, _ = image.kv.shape
    scales = np.asarray(image.scales).reshape(num_layers, h, -1, t)[:, ::more]
    arrays["scales"] = scales.reshape(num_layers, -1, t)
  return arrays


def stored_like(arrays: Mapping[str, np.ndarray], like: Pages) -> Pages:
  """The image with these `portable` arrays, stored and placed as the image `like` is.

  Raises:
    ValueError: They are arrays of another image.
  """
  num_layers, h, t, _ = like.kv.shape
  num_parts, more = (
    2 if like.value_dim is None else 1,
    1 if like.split is None else like.split.repeats,
  )
  shape = num_layers, h // more, t, num_parts * like.head_dim
  wanted: dict[str, tuple] = {"kv": (shape, like.dtype)}
  if like.scales is not None:
    wanted["scales"] = ((num_layers, num_parts * h // more, t), like.scales.dtype)
  given = {name: (x.shape, x.dtype) for name, x in arrays.items()}
  if given != wanted:
    raise ValueError(f"arrays must be {wanted}, got {given}")
  kv, padding = _by_part(arrays["kv"], like), like.kv.shape[-1] // num_parts - like.head_dim
  kv = np.pad(kv.repeat(more, axis=1), [(0, 0)] * (kv.ndim - 1) + [(0, padding)])
  scales = arrays.get("scales")
  if scales is not None:
    scales = scales.reshape(num_layers, h // more, num_parts, t).repeat(more, axis=1)
    scales = scales.reshape(num_layers, -1, t)
  kv = kv.reshape(like.kv.shape).view(like.kv.dtype)
  image = dataclasses.replace(like, kv=kv, scales=scales)
  return jax.device_put(image, jax.tree.map(lambda x: x.sharding, like))


def _by_part(kv: np.ndarray, image: Pages) -> np.ndarray:
  """Keys and values [...,2,D] of those beside each other [...,2D]; keys [...,1,D] if that is all."""
  return kv.reshape(*kv.shape[:-1], 2 if image.value_dim is None else 1, -1)


@jax.custom_jvp
def renew(pages: Pages, block_tables: jax.Array, copies: Copies) -> Pages:
  """Makes the pages that `copies` lists, in place, one page per turn. New pages are not read.

  # copy of a shared tail   source [0 1 2 .]  ──▶  target [0 1 . .]     kept 2, then zero
  # new page                no source         ──▶  target [. . . .]     all zero
  # stale tail, in place    source = target        [0 1 x x] ──▶ [0 1 . .]
  """
  n, t = pages.kv.shape[0], pages.kv.shape[3]
  num_copied = jnp.sum(copies.sources < n, axis=1, dtype=jnp.int32)  # the first ones of each row
  num_copied = jnp.minimum(num_copied, copies.num_pages)
  first_new = copies.first + num_copied

  def target(row, column):
    return block_tables.at[row, column].get(mode="fill", fill_value=n)

  def copy(pages, rows, nth):
    row, nth = rows[0], nth[0]
    column = copies.first.at[row].get(mode="fill", fill_value=0) + nth
    source = copies.sources.at[row, nth].get(mode="fill", fill_value=n)
    kept = copies.lengths.at[row].get(mode="fill", fill_value=0) - column * t
    live = jnp.arange(t, dtype=jnp.int32) < kept
    to = target(row, column)
    return jax.tree.map(lambda x: _replace(x, to, _only(live, _page(x, source), 2)), pages)

  def clear(pages, rows, nth):
    column = first_new.at[rows[0]].get(mode="fill", fill_value=0) + nth[0]
    to = target(rows[0], column)

    return jax.tree.map(lambda x, zero: _replace(x, to, zero), pages, _zero(pages))

  pages = loops.fold(num_copied, copy, pages, chunk=1)
  return placed(loops.fold(copies.num_pages - num_copied, clear, pages, chunk=1))


@renew.defjvp
def _renew_jvp(primals, tangents):
  """The same for tangents: all pages at once, since such a loop has no transpose."""
  pages, block_tables, copies = primals
  n, t = pages.kv.shape[0], pages.kv.shape[3]
  check_differentiable(pages)
  kv = tangents[0].kv
  num_rows, num_copies = copies.sources.shape
  nth = jnp.arange(num_copies, dtype=jnp.int32)[None]
  nowhere = block_tables.shape[1]
  columns = jnp.where(nth < copies.num_pages[:, None], copies.first[:, None] + nth, nowhere)
  rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
  targets = block_tables.at[rows, columns].get(mode="fill", fill_value=n)  # [S,C]
  kept = jnp.where(copies.sources < n, copies.lengths[:, None] - columns * t, 0)
  live = jnp.arange(t, dtype=jnp.int32)[None, None] < kept[..., None]  # [S,C,T]
  new = kv.at[copies.sources].get(mode="fill", fill_value=0)  # [S,C,L,H,T,2D]
  new = jnp.where(live[:, :, None, None, :, None], new, jnp.zeros((), kv.dtype))
  nowhere = n + jnp.arange(targets.size, dtype=jnp.int32).reshape(targets.shape)
  targets = jnp.where(targets < n, targets, nowhere)
  kv = kv.at[targets].set(new, mode="drop", unique_indices=True)
  return renew(*primals), dataclasses.replace(pages, kv=kv)


def check_differentiable(pages: Pages) -> None:
  """Raises if the page array keeps bits or 8-bit numbers: no gradient passes through them."""
  if pages.scales is not None or not jnp.issubdtype(pages.kv.dtype, jnp.floating):
    kept = "" if pages.kv.dtype == pages.dtype else f" as {pages.kv.dtype}"
    raise NotImplementedError(
      f"gradients do not pass through pages that keep {pages.dtype}{kept}: use a float32 cache, or"
      " differentiate a forward pass without a cache, like `Decoder.dense`"
    )


def read(pages: Pages, ids: jax.Array) -> Pages:
  """The bytes of pages `ids` i32[B], zero where there is no page."""
  return jax.lax.map(lambda page: read_one(pages, page), ids)


def read_one(pages: Pages, page: jax.Array) -> Pages:
  """The bytes of one page i32[], kv [L,H,T,2D], zero if there is no such page."""
  there = page < pages.kv.shape[0]
  return jax.tree.map(lambda x: jnp.where(there, _page(x, page), jnp.zeros((), x.dtype)), pages)


def put_one(pages: Pages, page: jax.Array, image: Pages) -> Pages:
  """Writes the bytes of `image` [L,H,T,2D] into one page i32[], or nowhere."""
  return placed(jax.tree.map(lambda x, new: _set_page(x, page, new), pages, image))


def clear(pages: Pages, ids: jax.Array) -> Pages:
  """Zero in pages `ids` i32[B], dropping those out of range."""
  zero = _zero(pages)
  return jax.lax.fori_loop(0, ids.shape[0], lambda i, pages: put_one(pages, ids[i], zero), pages)


def only(image: Pages, start: jax.Array, end: jax.Array) -> Pages:
  """The bytes of the tokens `start..end` of consecutive pages, and zero elsewhere."""
  b, t = image.kv.shape[0], image.kv.shape[3]
  positions = jnp.arange(b * t, dtype=jnp.int32).reshape(b, 1, 1, t)
  live = (positions >= start) & (positions < end)
  return jax.tree.map(lambda x: _only(live, x, 3), image)


def put(pages: Pages, ids: jax.Array, image: Pages) -> Pages:
  """Writes the bytes of `image` into pages `ids` i32[B], dropping those out of range."""
  n = pages.kv.shape[0]
  count = jnp.sum(ids < n, dtype=jnp.int32)  # the pages come first, then padding

  def step(pages, rows, nth):
    del rows
    target = ids.at[nth[0]].get(mode="fill", fill_value=n)
    return put_one(pages, target, jax.tree.map(lambda x: _page(x, nth[0]), image))

  return loops.fold(count[None], step, pages, chunk=1)


def _zero(pages: Pages) -> Pages:
  """A page of zeros, sharded as pages are."""
  zero = jax.tree.map(lambda x: jnp.zeros_like(jax.lax.index_in_dim(x, 0, keepdims=False)), pages)
  split = pages.split
  return zero if split is None else meshes.place(zero, split.mesh, split.spec(1))


def _only(live: jax.Array, x: jax.Array, axis: int) -> jax.Array:
  """`x` where tokens are `live`, else zero; `axis` is that of its tokens, and the last of `live`."""
  live = live.reshape(*live.shape, *[1] * (x.ndim - axis - 1))
  return jnp.where(live, x, jnp.zeros((), x.dtype))


def _page(x: jax.Array, page: jax.Array) -> jax.Array:
  """One page, kv [L,H,T,2D]; any page if there is no such page."""
  return jax.lax.dynamic_index_in_dim(x, page, axis=0, keepdims=False)


@jax.custom_batching.custom_vmap
def _replace(x: jax.Array, page: jax.Array, values: jax.Array) -> jax.Array:
  """Replaces one page, which must exist, and does not read it; under `vmap` as `_set_page`.

  Under `vmap` an element of the batch that is done has no page, while others go on.
  """
  return jax.lax.dynamic_update_index_in_dim(x, values, page, axis=0)


@_replace.def_vmap
def _replace_batch(axis_size, in_batched, *args):
  del axis_size
  return jax.vmap(_set_page, [0 if batched else None for batched in in_batched])(*args), True


def _set_page(x: jax.Array, page: jax.Array, values: jax.Array) -> jax.Array:
  """Replaces one page, or none. By dynamic slices: a scatter of pages is not in place on TPU."""
  values = jnp.where(page < x.shape[0], values, _page(x, page))
  return jax.lax.dynamic_update_index_in_dim(x, values, page, axis=0)
