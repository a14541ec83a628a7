"""The page array: write, gather, copy, clear. Only this module and the kernels know its layout.

Axis letters: N pages, L layers, H KV heads, T tokens per page, D head dim as stored, B entries in a
call; `head_dim` is that of the values, at most D.

    # one token of one head   [k k k k k 0 0 0 | v v v v v 0 0 0]      head_dim 5, D 8
    # pages of keys only      [v v v k k 0 0 0]                        value_dim 3 of the key's 5
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import loops
from paged_jax.config import CacheConfig
from paged_jax.types import Copies, Pages


def init(config: CacheConfig) -> Pages:
  """An array of zero pages."""
  shape = (config.num_pages, config.num_layers, config.num_kv_heads, config.page_size,
           config.array_channels)  # fmt: skip
  kv = jnp.zeros(shape, config.array_dtype)
  return Pages(kv, np.dtype(config.dtype), config.head_dim, config.value_dim)


def sizes(pages: Pages) -> tuple[int, int, int, int, int]:
  """N, L, H, T and D of the page array; callers' arrays have `pages.head_dim` in place of D."""
  n, num_layers, h, t, width = pages.kv.shape
  return n, num_layers, h, t, width // 2 if pages.value_dim is None else width


def layer_bytes(pages: Pages) -> int:
  """Bytes of one page in one layer."""
  return math.prod(pages.kv.shape[2:]) * pages.kv.dtype.itemsize


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


def stored(x: jax.Array, pages: Pages) -> jax.Array:
  """What the page array keeps of `x` [...,head_dim]: its bits in the array's dtype, [...,D]."""
  return _as(padded(x.astype(pages.dtype), pages), pages.kv.dtype)


def values(bits: jax.Array, pages: Pages) -> jax.Array:
  """The values of `bits` of the page array, in the pages' dtype."""
  return _as(bits, pages.dtype)


def _as(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def write(
  pages: Pages, layer: jax.Array, k: jax.Array, v: jax.Array | None, slots: jax.Array
) -> Pages:
  """Writes `k`, `v` [B,H,head_dim] of one layer at distinct `slots` i32[B]; drops out of range.

  `v` is None if pages hold keys only.
  """
  t, bits = pages.kv.shape[3], stored(k, pages)
  if v is not None:
    bits = jnp.concatenate([bits, stored(v, pages)], axis=-1)
  kv = pages.kv.at[slots // t, layer, :, slots % t].set(bits, mode="drop", unique_indices=True)
  return dataclasses.replace(pages, kv=kv)


def gather(pages: Pages, layer: jax.Array, tables: jax.Array) -> tuple[jax.Array, jax.Array]:
  """K and V [R,P*T,H,channels] of one layer by block `tables` i32[R,P], zero where no page is."""
  _, _, h, t, d = sizes(pages)
  bits = pages.kv.at[tables, layer].get(mode="fill", fill_value=0)  # [R,P,H,T,2D]
  r, p = tables.shape
  kv = values(bits.transpose(0, 1, 3, 2, 4).reshape(r, p * t, h, -1), pages)
  behind = kv[..., d:] if pages.value_dim is None else kv
  return kv[..., : pages.head_dim], cropped(behind, pages)


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

  def copy(kv, rows, nth):
    row, nth = rows[0], nth[0]
    column = copies.first.at[row].get(mode="fill", fill_value=0) + nth
    source = copies.sources.at[row, nth].get(mode="fill", fill_value=n)
    kept = copies.lengths.at[row].get(mode="fill", fill_value=0) - column * t
    offsets = jnp.arange(t, dtype=jnp.int32)[None, None, :, None]
    page = jnp.where(offsets < kept, _page(kv, source), jnp.zeros((), kv.dtype))
    return _replace(kv, target(row, column), page)

  def clear(kv, rows, nth):
    column = first_new.at[rows[0]].get(mode="fill", fill_value=0) + nth[0]
    zero = jnp.zeros_like(jax.lax.index_in_dim(kv, 0, keepdims=False))  # sharded as pages are
    return _replace(kv, target(rows[0], column), zero)

  kv = loops.fold(num_copied, copy, pages.kv, chunk=1)
  kv = loops.fold(copies.num_pages - num_copied, clear, kv, chunk=1)
  return dataclasses.replace(pages, kv=kv)


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
  """Raises if the page array keeps bits, because no gradient passes through them."""
  if not jnp.issubdtype(pages.kv.dtype, jnp.floating):
    raise NotImplementedError(
      f"gradients do not pass through pages that keep {pages.dtype} as {pages.kv.dtype}: use a"
      " float32 cache, or differentiate a forward pass without a cache, like `Decoder.dense`"
    )


def read(pages: Pages, ids: jax.Array) -> Pages:
  """The bytes of pages `ids` i32[B], zero where there is no page."""
  return jax.lax.map(lambda page: read_one(pages, page), ids)


def read_one(pages: Pages, page: jax.Array) -> Pages:
  """The bytes of one page i32[], kv [L,H,T,2D], zero if there is no such page."""
  kv = jnp.where(page < pages.kv.shape[0], _page(pages.kv, page), jnp.zeros((), pages.kv.dtype))
  return dataclasses.replace(pages, kv=kv)


def put_one(pages: Pages, page: jax.Array, image: Pages) -> Pages:
  """Writes the bytes of `image` [L,H,T,2D] into one page i32[], or nowhere."""
  return dataclasses.replace(pages, kv=_set_page(pages.kv, page, image.kv))


def clear(pages: Pages, ids: jax.Array) -> Pages:
  """Zero in pages `ids` i32[B], dropping those out of range."""
  zero = jnp.zeros(pages.kv.shape[1:], pages.kv.dtype)
  kv = jax.lax.fori_loop(0, ids.shape[0], lambda i, kv: _set_page(kv, ids[i], zero), pages.kv)
  return dataclasses.replace(pages, kv=kv)


def only(image: Pages, start: jax.Array, end: jax.Array) -> Pages:
  """The bytes of the tokens `start..end` of consecutive pages, and zero elsewhere."""
  b, t = image.kv.shape[0], image.kv.shape[3]
  positions = jnp.arange(b * t, dtype=jnp.int32).reshape(b, 1, 1, t, 1)
  live = (positions >= start) & (positions < end)
  kv = jnp.where(live, image.kv, jnp.zeros((), image.kv.dtype))
  return dataclasses.replace(image, kv=kv)


def put(pages: Pages, ids: jax.Array, image: Pages) -> Pages:
  """Writes the bytes of `image` into pages `ids` i32[B], dropping those out of range."""
  n = pages.kv.shape[0]
  count = jnp.sum(ids < n, dtype=jnp.int32)  # the pages come first, then padding

  def step(kv, rows, nth):
    del rows
    target = ids.at[nth[0]].get(mode="fill", fill_value=n)
    return _set_page(kv, target, _page(image.kv, nth[0]))

  return dataclasses.replace(pages, kv=loops.fold(count[None], step, pages.kv, chunk=1))


def _page(kv: jax.Array, page: jax.Array) -> jax.Array:
  """One page [L,H,T,2D]; any page if there is no such page."""
  return jax.lax.dynamic_index_in_dim(kv, page, axis=0, keepdims=False)


@jax.custom_batching.custom_vmap
def _replace(kv: jax.Array, page: jax.Array, values: jax.Array) -> jax.Array:
  """Replaces one page, which must exist, and does not read it; under `vmap` as `_set_page`.

  Under `vmap` an element of the batch that is done has no page, while others go on.
  """
  return jax.lax.dynamic_update_index_in_dim(kv, values, page, axis=0)


@_replace.def_vmap
def _replace_batch(axis_size, in_batched, *args):
  del axis_size
  return jax.vmap(_set_page, [0 if batched else None for batched in in_batched])(*args), True


def _set_page(kv: jax.Array, page: jax.Array, values: jax.Array) -> jax.Array:
  """Replaces one page, or none. By dynamic slices: a scatter of pages is not in place on TPU."""
  values = jnp.where(page < kv.shape[0], values, _page(kv, page))
  return jax.lax.dynamic_update_index_in_dim(kv, values, page, axis=0)
