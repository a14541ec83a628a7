"""Bytes out of the cache and back: of a row (`swap_out`, `swap_in`), of pages (`offload`, `restore`).

An image is bytes outside the cache. They come back in fresh pages: rows that shared a page before
they were swapped out share it no longer.

Axis letters: B pages in a call or an image, L layers, H KV heads, T tokens per page, D head dim.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from paged_jax import arguments
from paged_jax import ledger as ledger_lib
from paged_jax import pages as pages_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.types import Cache, Image, Info, Pages


def swap_out(
  cache: Cache, row: jax.Array, *, num_pages: int | None = None
) -> tuple[Cache, Image, Info]:
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
  ledger = cache.ledger
  bucket = ledger.pages_per_row
  if num_pages is not None:
    bucket = arguments.size("num_pages", num_pages, ledger.pages_per_row)
  mask = jnp.arange(ledger.num_rows, dtype=jnp.int32) == row
  start = jnp.sum(jnp.where(mask, ledger.tables.starts, 0), dtype=jnp.int32)
  length = jnp.sum(jnp.where(mask, ledger.tables.lengths, 0), dtype=jnp.int32)
  first, count = tables_lib.span(start, length, ledger.page_size)
  ok = (length > 0) & (count <= bucket)
  columns = first + jnp.arange(bucket, dtype=jnp.int32)
  known = jnp.where(ok, row, ledger.num_rows)
  pages = tables_lib.page_at(ledger.tables.block_tables, known, columns, ledger.pool.num_pages)
  start, length = jnp.where(ok, start, 0), jnp.where(ok, length, 0)
  image = pages_lib.read(cache.pages, pages)
  image = pages_lib.only(image, start - first * ledger.page_size, length - first * ledger.page_size)
  ledger, info = ledger_lib.free(ledger, mask & ok)
  cache = Cache(ledger=ledger, pages=cache.pages)
  return cache, Image(image, start, length), info._replace(ok=ok)


def swap_in(cache: Cache, row: jax.Array, image: Image) -> tuple[Cache, Info]:
  """Puts an image of `swap_out` into fresh pages of the empty row i32[]; all or nothing.

  Returns:
    The next cache, and `Info` with ok bool[]: False if the row is unknown or not empty, or if the
    image needs more pages than are free.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, image, _ = pj.jitted.swap_out(cache, jnp.array(0))
  >>> cache, info = pj.jitted.swap_in(cache, jnp.array(1), image)
  >>> bool(info.ok), cache.lengths.tolist()
  (True, [0, 6])
  """
  row = arguments.integers("row", row, ())
  shape = (max(1, image.pages.kv.shape[0]), *cache.pages.kv.shape[1:])
  _check_image("image.pages", image.pages, cache.pages, shape)
  start = arguments.integers("image.start", image.start, ())
  length = arguments.integers("image.length", image.length, ())
  s = cache.ledger.num_rows
  _, count = tables_lib.span(start, length, cache.ledger.page_size)
  vacant = cache.lengths.at[jnp.where(row >= 0, row, s)].get(mode="fill", fill_value=1) == 0
  sane = (start >= 0) & (start <= length) & (length <= cache.ledger.capacity)
  asked = jnp.where(vacant & sane, count, -1)
  # take_held  the host holds the pages alone
  # adopt      the row has them too
  # drop       the row has them alone: none stays shared, so `copy_on_write` does not matter
  ledger, pages, info = ledger_lib.take_held(cache.ledger, asked, image.pages.kv.shape[0])
  bytes_ = pages_lib.put(cache.pages, pages, image.pages)
  ledger = dataclasses.replace(ledger, copy_on_write=True)
  ledger, _ = ledger_lib.adopt(
    ledger, row[None], pages[None], jnp.where(info.ok, length, 0)[None], start[None]
  )
  ledger, _ = ledger_lib.drop(ledger, pages)
  ledger = dataclasses.replace(ledger, copy_on_write=cache.ledger.copy_on_write)
  return Cache(ledger=ledger, pages=bytes_), info._replace(num_free=ledger.pool.num_free)


def offload(cache: Cache, pages: jax.Array) -> tuple[Pages, ...]:
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
  pages = arguments.integers("pages", pages, (None,))
  n = cache.ledger.pool.num_pages
  known = jnp.where(pages >= 0, pages, n)
  images = (pages_lib.read_one(cache.pages, known[i]) for i in range(pages.shape[0]))
  return tuple(jax.device_put(image, jax.memory.Space.Host) for image in images)


def restore(
  cache: Cache, images: Sequence[Pages], count: jax.Array
) -> tuple[Cache, jax.Array, Info]:
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
  if not images:
    raise ValueError("images must have at least one page, got none")
  for i, image in enumerate(images):
    _check_image(f"images[{i}]", image, cache.pages, cache.pages.kv.shape[1:])
  ledger, pages, info = ledger_lib.take_held(cache.ledger, count, len(images))
  bytes_ = cache.pages
  for i, image in enumerate(images):
    image = jax.device_put(image, jax.memory.Space.Device)
    bytes_ = pages_lib.put_one(bytes_, pages[i], image)
  return Cache(ledger=ledger, pages=bytes_), pages, info


def _check_image(name: str, image: Pages, pages: Pages, shape: tuple[int, ...]) -> None:
  """Raises unless `image` has the shape, the dtypes and the dims that `pages` would give it."""
  wanted, got = (
    f"{jax.ShapeDtypeStruct(shape, x.kv.dtype)} of {x.dtype}, value_dim {x.value_dim} and"
    f" head_dim {x.head_dim}"
    for shape, x in ((shape, pages), (image.kv.shape, image))
  )
  if got != wanted:
    raise ValueError(f"{name} must be {wanted}, got {got}")
