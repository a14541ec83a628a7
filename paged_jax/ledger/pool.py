"""The page pool: a packed free-list bitmap and a refcount vector, always written together.

Page ids given to these functions are in 0..N, and N is no page. The callers check them.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from paged_jax import loops
from paged_jax.types import Pool

Carry = TypeVar("Carry")

_WORD = 32  # bits in a word of the bitmap
_WINDOW = 256  # words searched at once: 8,192 pages


def init(num_pages: int) -> Pool:
  """A pool whose pages are all free."""
  bits = jnp.arange(-(-num_pages // _WORD) * _WORD) < num_pages
  return Pool(
    free=pack(bits),
    refcount=jnp.zeros(num_pages, jnp.int32),
    holds=jnp.zeros(num_pages, jnp.int32),
    num_free=jnp.int32(num_pages),
    cursor=jnp.int32(0),
  )


def pack(bits: jax.Array) -> jax.Array:
  """bool[32 * W] as u32[W], lowest bit first."""
  place = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
  words = jnp.where(bits.reshape(-1, _WORD), place[None, :], jnp.uint32(0))
  return jnp.sum(words, axis=1, dtype=jnp.uint32)


def refcounts(pool: Pool, pages: jax.Array) -> jax.Array:
  """Holders of each of `pages`; 0 for no page."""
  return pool.refcount.at[pages].get(mode="fill", fill_value=0)


def take(
  pool: Pool,
  count: jax.Array,
  place: Callable[[Carry, jax.Array, jax.Array], Carry],
  carry: Carry,
  *,
  chunk: int,
) -> tuple[Pool, Carry]:
  """Takes the next `count` free pages from the cursor on, and folds `place` over them.

  # free      . 1 . 3 4 . 6 .      cursor 3, count 3
  # taken           3 4   6        each gets one holder; the next cursor is 7

  The search goes round the bitmap once, a window of words at a time. One turn takes at most `chunk`
  pages. The cost depends on the pages taken and not on N.

  Args:
    pool: The pool.
    count: i32[] pages to take, at most the free ones.
    place: `place(carry, ranks, pages)` stores a chunk: ranks i32[chunk] number the pages of this
      call from 0, and pages i32[chunk] is N where there is none.
    carry: What `place` starts from.
    chunk: Pages per turn, static.
  """

  def turn(state):
    pool, carry, taken, position = state
    pages, position = _search(pool, position, count - taken, chunk)
    found = jnp.sum(pages < pool.num_pages, dtype=jnp.int32)
    carry = place(carry, taken + jnp.arange(chunk, dtype=jnp.int32), pages)
    last = pages[jnp.maximum(found - 1, 0)]
    pool = dataclasses.replace(
      _flip(pool, pages, freed=False),
      refcount=pool.refcount.at[pages].set(1, mode="drop"),
      cursor=jnp.where(found > 0, (last + 1) % pool.num_pages, pool.cursor),
    )
    return pool, carry, taken + found, position

  start = (pool, carry, jnp.int32(0), pool.cursor)
  return jax.lax.while_loop(lambda state: loops.any_of(state[2] < count), turn, start)[:2]


def retain(pool: Pool, pages: jax.Array) -> Pool:
  """Adds a holder for each entry of `pages`, which all have one already."""
  return dataclasses.replace(pool, refcount=pool.refcount.at[pages].add(1, mode="drop"))


def release(pool: Pool, pages: jax.Array) -> Pool:
  """Removes a holder for each entry of `pages`; a page without holders is free."""
  n = pool.num_pages
  refcount = pool.refcount.at[pages].add(-1, mode="drop")
  emptied = refcount.at[pages].get(mode="fill", fill_value=1) == 0
  # A page named twice must be freed once: its entries leave their numbers in its own (now zero)
  # refcount, and the largest one wins.
  numbers = jnp.arange(1, pages.shape[0] + 1, dtype=jnp.int32)
  marked = refcount.at[jnp.where(emptied, pages, n)].max(numbers, mode="drop")
  winner = emptied & (marked.at[pages].get(mode="fill", fill_value=0) == numbers)
  freed = jnp.where(winner, pages, n)
  pool = dataclasses.replace(pool, refcount=marked.at[freed].set(0, mode="drop"))
  return _flip(pool, freed, freed=True)


def hold(pool: Pool, pages: jax.Array) -> Pool:
  """Adds a hold of the host for each entry of `pages`, which all have a holder already."""
  return dataclasses.replace(retain(pool, pages), holds=pool.holds.at[pages].add(1, mode="drop"))


def claim(pool: Pool, pages: jax.Array) -> Pool:
  """Makes the host the holder of each of `pages`, which were just taken."""
  return dataclasses.replace(pool, holds=pool.holds.at[pages].set(1, mode="drop"))


def drop(pool: Pool, pages: jax.Array) -> Pool:
  """Removes a hold of the host for each entry of `pages`; a page without holders is free."""
  pool = dataclasses.replace(pool, holds=pool.holds.at[pages].add(-1, mode="drop"))
  return release(pool, pages)


def _flip(pool: Pool, pages: jax.Array, *, freed: bool) -> Pool:
  """Flips the bit of each of `pages`, all distinct, and updates the count of free pages."""
  bits = jnp.uint32(1) << (pages % _WORD).astype(jnp.uint32)
  words = jnp.where(pages < pool.num_pages, pages // _WORD, pool.free.shape[0])
  count = jnp.sum(pages < pool.num_pages, dtype=jnp.int32)
  # Distinct bits of one word add up without a carry, so addition is "or" (and "and not").
  free = pool.free.at[words].add(bits if freed else -bits, mode="drop")
  return dataclasses.replace(pool, free=free, num_free=pool.num_free + (count if freed else -count))


def _search(
  pool: Pool, position: jax.Array, wanted: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Up to `wanted` free pages of the window of words at `position`, and the next position.

  Returns:
    pages i32[chunk], ascending, N past the last one found, and the next position.
  """
  size = min(_WINDOW, pool.free.shape[0])
  words = position // _WORD + jnp.arange(size, dtype=jnp.int32)
  free = pool.free.at[words].get(mode="fill", fill_value=0)
  ahead = ~jnp.uint32(0) << (position % _WORD).astype(jnp.uint32)
  free = jnp.where(
    words == words[0], free & ahead, free
  )  # earlier bits come last, after a full lap

  count = jax.lax.population_count(free).astype(jnp.int32)
  word, nth = loops.locate(count, jnp.arange(chunk, dtype=jnp.int32))
  bit = _nth_bit(free.at[word].get(mode="fill", fill_value=0), nth)
  found = (word < size) & (jnp.arange(chunk, dtype=jnp.int32) < wanted)
  pages = jnp.where(found, (words[0] + word) * _WORD + bit, pool.num_pages)

  more = jnp.sum(count, dtype=jnp.int32) > chunk  # the window has pages left for another turn
  position = jnp.where(more, pages[-1] + 1, (words[0] + size) * _WORD)
  return pages, jnp.where(position < pool.num_pages, position, 0)


def _nth_bit(words: jax.Array, nth: jax.Array) -> jax.Array:
  """Index of the nth set bit of each word, by halving."""
  at = jnp.zeros_like(nth)
  for width in (16, 8, 4, 2, 1):
    low = (words >> at.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1)
    count = jax.lax.population_count(low).astype(nth.dtype)
    above = nth >= count
    nth = jnp.where(above, nth - count, nth)
    at = jnp.where(above, at + width, at)
  return at
