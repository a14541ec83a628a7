import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.ledger import pool as pool_lib


@functools.partial(jax.jit, static_argnames="chunk")
def taken(pool, count, chunk=4):
  size = 64
  return pool_lib.take(
    pool,
    jnp.asarray(count, jnp.int32),
    lambda ids, ranks, pages: ids.at[ranks].set(pages, mode="drop"),
    jnp.full(size, pool.num_pages, jnp.int32),
    chunk=chunk,
  )


def ids(*values):
  return jnp.array(values, jnp.int32)


def free_bits(pool):
  return np.unpackbits(np.asarray(pool.free).view(np.uint8), bitorder="little")[: pool.num_pages]


def check(pool):
  np.testing.assert_array_equal(free_bits(pool), np.asarray(pool.refcount) == 0)
  assert int(pool.num_free) == free_bits(pool).sum()


@pytest.mark.parametrize("num_pages", [1, 2, 31, 32, 33, 64, 100])
def test_a_fresh_pool_hands_out_every_id_in_order(num_pages):
  pool = pool_lib.init(num_pages)
  assert int(pool.num_free) == num_pages
  pool, pages = taken(pool, min(num_pages, 64))
  np.testing.assert_array_equal(pages[:num_pages], np.arange(min(num_pages, 64)))
  check(pool)


def test_the_search_goes_on_where_it_stopped_and_wraps_around():
  pool, _ = taken(pool_lib.init(8), 6)
  pool = pool_lib.release(pool, ids(1, 4))
  pool, pages = taken(pool, 3)
  np.testing.assert_array_equal(pages[:3], [6, 7, 1])
  assert int(pool.cursor) == 2
  check(pool)


def test_a_search_crosses_windows_of_the_bitmap():
  pool = pool_lib.init(3 * 8192)
  busy = np.ones(pool.num_pages, np.int32)
  busy[[5, 8192 + 7, 3 * 8192 - 1]] = 0
  free = pool_lib.pack(jnp.asarray(busy == 0))
  pool = dataclasses.replace(
    pool, free=free, refcount=jnp.asarray(busy), num_free=jnp.int32(3), cursor=jnp.int32(100)
  )
  pool, pages = taken(pool, 3)
  np.testing.assert_array_equal(pages[:3], [8192 + 7, 3 * 8192 - 1, 5])
  check(pool)


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_pages_do_not_depend_on_how_many_are_found_per_turn(chunk):
  pool, _ = taken(pool_lib.init(40), 40)
  pool = pool_lib.release(pool, ids(*range(1, 40, 3)))
  pool, pages = taken(pool, 13, chunk)
  np.testing.assert_array_equal(pages[:13], range(1, 40, 3))
  check(pool)


def test_a_page_is_free_only_after_its_last_holder_left():
  pool, _ = taken(pool_lib.init(4), 1)
  pool = pool_lib.retain(pool, ids(0, 0))
  pool = pool_lib.release(pool, ids(0, 4))
  assert int(pool.refcount[0]) == 2
  pool = pool_lib.release(pool, ids(0, 0))
  assert int(pool.num_free) == 4
  check(pool)


def test_a_page_released_by_all_its_holders_at_once_is_freed_once():
  pool, _ = taken(pool_lib.init(40), 40)
  pool = pool_lib.retain(pool, ids(33, 33, 7))
  pool = pool_lib.release(pool, ids(33, 7, 33, 40, 33, 7, 8))
  assert int(pool.num_free) == 3
  check(pool)


def test_equal_requests_give_equal_pages_under_every_transform():
  def some(pool):
    pool, pages = taken(pool, 5)
    pool = pool_lib.release(pool, pages[:2])
    return taken(pool, 37)

  pool = pool_lib.init(60)
  plain = some(pool)
  chex.assert_trees_all_equal(plain, jax.jit(some)(pool))
  two = jax.tree.map(lambda x: jnp.stack([x, x]), pool)
  both = jax.jit(jax.vmap(some))(two)
  chex.assert_trees_all_equal(jax.tree.map(lambda x: jnp.stack([x, x]), plain), both)
  scanned = jax.lax.scan(lambda p, _: some(p), pool, None, length=1)
  chex.assert_trees_all_equal(plain, (scanned[0], scanned[1][0]))
