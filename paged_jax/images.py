"""Bytes out of the cache and back: of a row (`swap_out`, `swap_in`), of pages (`offload`, `restore`).

An image is bytes outside the cache. They come back in fresh pages: rows that shared a page before
they were swapped out share it no longer.

Each verb takes a tuple of caches, too: a row leaves or comes in all of them or in none.

Axis letters: B pages in a call or an image, L layers, H KV heads, T tokens per page, D head dim.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paged_jax import arguments, groups
from paged_jax import cache as cache_lib
from paged_jax import ledger as ledger_lib
from paged_jax import pages as pages_lib
from paged_jax.cache import Caches
from paged_jax.ledger import tables as tables_lib
from paged_jax.types import Cache, Image, Info, Ledger, Pages


def swap_out(cache: Caches, row: jax.Array, *, num_pages: Any = None) -> tuple[Caches, Any, Info]:
  """Takes the bytes of one row i32[] out of the cache, and frees the row.

      # row 0  [a][b]  ── swap_out ──▶  image                 a and b lose a holder
      # image          ── swap_in ───▶  row 1  [c][d]         fresh pages, the row's own

  Args:
    cache: The cache.
    row: i32[] the row. An unknown or empty row is refused, and its image is empty.
    num_pages: Pages in the image, static; all that a row can map by default. A row that maps more
      is refused.

  Returns:
    The next cache, the image, and `Info` with ok bool[].

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, image, info = pj.jitted.swap_out(cache, jnp.array(0))
  >>> int(image.length), int(info.num_free)
  (6, 8)
  """
  row = arguments.integers("row", row, ())
  caches = groups.each(cache)
  if num_pages is None:
    num_pages = groups.like(cache, [each.ledger.pages_per_row for each in caches])
  limits = groups.values_for("num_pages", num_pages, cache)
  ok = groups.all_of(_fits(*each, row) for each in zip(caches, limits))
  images = [_image(*each, row, ok) for each in zip(caches, limits)]
  mask = jnp.arange(caches[0].ledger.num_rows, dtype=jnp.int32) == row
  ledger, info = ledger_lib.free(cache_lib.ledgers(cache), mask & ok)
  made = [Cache(*both) for both in zip(groups.each(ledger), (each.pages for each in caches))]
  return groups.like(cache, made), groups.like(cache, images), info._replace(ok=ok)


def _bounds(ledger: Ledger, row: jax.Array) -> tuple[jax.Array, jax.Array]:
  """First live token and length of a row i32[]; 0 if there is no such row."""
  mask = jnp.arange(ledger.num_rows, dtype=jnp.int32) == row
  start = jnp.sum(jnp.where(mask, ledger.tables.starts, 0), dtype=jnp.int32)
  return start, jnp.sum(jnp.where(mask, ledger.tables.lengths, 0), dtype=jnp.int32)


def _fits(cache: Cache, num_pages: int, row: jax.Array) -> jax.Array:
  """Whether a row has tokens, and at most `num_pages` pages: bool[]."""
  num_pages = arguments.size("num_pages", num_pages, cache.ledger.pages_per_row)
  start, length = _bounds(cache.ledger, row)
  _, count = tables_lib.span(start, length, cache.ledger.page_size)
  return (length > 0) & (count <= num_pages)


def _image(cache: Cache, num_pages: int, row: jax.Array, ok: jax.Array) -> Image:
  """The image of a row, in `num_pages` pages; an empty one unless `ok` bool[]."""
  ledger, size = cache.ledger, cache.ledger.page_size
  start, length = (jnp.where(ok, bound, 0) for bound in _bounds(ledger, row))
  first, _ = tables_lib.span(start, length, size)
  columns = first + jnp.arange(num_pages, dtype=jnp.int32)
  known = jnp.where(ok, row, ledger.num_rows)
  pages = tables_lib.page_at(ledger.tables.block_tables, known, columns, ledger.pool.num_pages)
  image = pages_lib.only(
    pages_lib.read(cache.pages, pages), start - first * size, length - first * size
  )
  return Image(image, start, length)


def swap_in(cache: Caches, row: jax.Array, image: Any) -> tuple[Caches, Info]:
  """Puts an image of `swap_out` into fresh pages of the empty row i32[]; all or nothing.

  Returns:
    The next cache, and `Info` with ok bool[]: False if the row is unknown or not empty, if the
    image needs more pages than are free, or if it lacks tokens that the cache's window sees.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, image, _ = pj.jitted.swap_out(cache, jnp.array(0))
  >>> cache, info = pj.jitted.swap_in(cache, jnp.array(1), image)
  >>> bool(info.ok), cache.lengths.tolist()
  (True, [0, 6])
  """
  row = arguments.integers("row", row, ())
  caches, images = groups.each(cache), groups.values_for("image", image, cache)
  images = [_checked(*each) for each in zip(caches, images)]
  lengths = images[0].length
  s = caches[0].ledger.num_rows
  ok = caches[0].lengths.at[jnp.where(row >= 0, row, s)].get(mode="fill", fill_value=1) == 0
  for each, its_image in zip(caches, images):
    latest = tables_lib.latest_start(its_image.length, each.ledger.window)
    ok &= (its_image.start >= 0) & (its_image.start <= latest)
    ok &= (its_image.length <= each.ledger.capacity) & (its_image.length == lengths)
  counts, sizes = [], []
  for each, its_image in zip(caches, images):
    _, count = tables_lib.span(its_image.start, its_image.length, each.ledger.page_size)
    counts.append(jnp.where(ok, count, -1))
    sizes.append(its_image.pages.kv.shape[0])
  # take_held  the host holds the pages alone
  # adopt      the row has them too
  # drop       the row has them alone: none stays shared, so `copy_on_write` does not matter
  counts, sizes = groups.like(cache, counts), groups.like(cache, sizes)
  ledger, pages, info = ledger_lib.take_held(cache_lib.ledgers(cache), counts, sizes)
  ledger = _with_copy_on_write(ledger, True)
  lists = groups.like(cache, [each[None] for each in groups.each(pages)])
  starts = groups.like(cache, [each.start[None] for each in images])
  ledger, _ = ledger_lib.adopt(
    ledger, row[None], lists, jnp.where(info.ok, lengths, 0)[None], starts
  )
  ledger, dropped = ledger_lib.drop(ledger, pages)
  ledger = _with_copy_on_write(ledger, caches[0].ledger.copy_on_write)
  made = [
    Cache(own, pages_lib.put(each.pages, ids, its_image.pages))
    for own, each, ids, its_image in zip(groups.each(ledger), caches, groups.each(pages), images)
  ]
  return groups.like(cache, made), info._replace(num_free=dropped.num_free)


def _checked(cache: Cache, image: Image) -> Image:
  """The image, if it is one of such a cache."""
  count = max(1, image.pages.kv.shape[0])
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), cache.pages)
  _check_image("image.pages", image.pages, wanted)
  pages = dataclasses.replace(image.pages, split=cache.pages.split)  # wherever it was before
  start = arguments.integers("image.start", image.start, ())
  return Image(pages, start, arguments.integers("image.length", image.length, ()))


def _with_copy_on_write(ledger: Any, value: bool) -> Any:
  """The ledger of each group with `copy_on_write` set so."""
  return groups.like(
    ledger, [dataclasses.replace(each, copy_on_write=value) for each in groups.each(ledger)]
  )


def offload(cache: Caches, pages: Any) -> Any:
  """Copies each of `pages` i32[B] to host memory: B images, each with kv [L,H,T,2D].

      # page a  ── offload ──▶  image           a keeps its holders; then usually `drop`
      # image   ── restore ──▶  page c, fresh   the host holds c

  An image is zero where there is no such page, and may hold anything where the page is free. One
  image per page, so that each can be kept, shared and forgotten alone. Inside `jit` (so in
  `jitted` too) the images are in pinned host memory if the backend has it, and no copy waits for
  another one. A program that also changes bytes of the cache afterwards copies the whole page
  array: call `offload` in a program of its own. (`swap_out` is in place in any program.)

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> images = pj.jitted.offload(cache, jnp.array([0, 1]))
  >>> cache, _ = pj.jitted.free(cache, jnp.array([True, False]))
  >>> cache, pages, info = pj.jitted.restore(cache, images, jnp.array(2))
  >>> pages.tolist(), cache.ledger.pool.holds.tolist()
  ([2, 3], [0, 0, 1, 1, 0, 0, 0, 0])
  """
  listed = groups.values_for("pages", pages, cache)
  return groups.like(cache, [_offload(*each) for each in zip(groups.each(cache), listed)])


def _offload(cache: Cache, pages: jax.Array) -> tuple[Pages, ...]:
  pages = arguments.integers("pages", pages, (None,))
  n = cache.ledger.pool.num_pages
  known = jnp.where(pages >= 0, pages, n)
  images = (pages_lib.read_one(cache.pages, known[i]) for i in range(pages.shape[0]))
  return tuple(jax.device_put(image, jax.memory.Space.Host) for image in images)


def restore(cache: Caches, images: Any, count: Any) -> tuple[Caches, Any, Info]:
  """Copies the first `count` i32[] of `images` into fresh pages, which the host then holds.

  The images are those of `offload`. Inside a program they may also be device arrays of that shape.

  Returns:
    The next cache; the pages i32[B], N past `count`, or everywhere if refused; and `Info` with
    ok bool[]. All images fit or none: a count that is negative, above B, or above the number of
    free pages is refused.

  Raises:
    ValueError: There is no image, or one has another shape or dtype than the cache's pages.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> images = pj.jitted.offload(cache, jnp.array([0, 1]))
  >>> cache, pages, info = pj.jitted.restore(cache, images, jnp.array(1))
  >>> pages.tolist(), bool(info.ok)  # 8 is "no page"
  ([2, 8], True)
  """
  listed = groups.values_for("images", images, cache) if groups.several(cache) else (images,)
  for each, its_images in zip(groups.each(cache), listed):
    if not its_images:
      raise ValueError("images must have at least one page, got none")
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), each.pages)
    for i, image in enumerate(its_images):
      _check_image(f"images[{i}]", image, wanted)
  sizes = groups.like(cache, list(map(len, listed)))
  ledger, pages, info = ledger_lib.take_held(cache_lib.ledgers(cache), count, sizes)
  made = [
    Cache(own, _filled(each.pages, ids, its_images))
    for own, each, ids, its_images in zip(
      groups.each(ledger), groups.each(cache), groups.each(pages), listed
    )
  ]
  return groups.like(cache, made), pages, info


def _filled(pages: Pages, ids: jax.Array, images: Sequence[Pages]) -> Pages:
  """The bytes of `images` in pages `ids` i32[B]."""
  for i, image in enumerate(images):
    image = dataclasses.replace(image, split=pages.split)  # wherever it was before
    pages = pages_lib.put_one(pages, ids[i], jax.device_put(image, jax.memory.Space.Device))
  return pages


def _check_image(name: str, image: Pages, wanted: Pages) -> None:
  """Raises unless `image` has the shapes, the dtypes and the dims of `wanted`."""
  want, got = map(_described, (wanted, image))
  if got != want:
    raise ValueError(f"{name} must be {want}, got {got}")


def _described(pages: Pages) -> str:
  scales = (
    None if pages.scales is None else jax.ShapeDtypeStruct(pages.scales.shape, pages.scales.dtype)
  )
  return (
    f"{jax.ShapeDtypeStruct(pages.kv.shape, pages.kv.dtype)} of {pages.dtype}, scales {scales}, value_dim"
    f" {pages.value_dim} and head_dim {pages.head_dim}"
  )
