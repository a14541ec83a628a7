"""The verbs of the ledger alone: it runs without bytes, and agrees with the cache's."""

import chex
import jax
import jax.numpy as jnp
from story import config, empty, extend, ids, pages_of, read, write

from paged_jax import jitted
from paged_jax import ledger as ledger_lib


def test_a_ledger_without_bytes_makes_the_same_decisions_as_a_cache():
  cache = empty()
  ledger = jitted.ledger.init(config())
  cache, _ = jitted.extend(cache, ids(5, 0, 9))
  ledger, _, copies = jitted.ledger.extend(ledger, ids(5, 0, 9))
  assert copies.num_pages.tolist() == [2, 0, 3] and int(copies.sources.min()) == 8
  cache, _ = jitted.fork(cache, ids(0), ids(1), ids(5))
  ledger, _ = jitted.ledger.fork(ledger, ids(0), ids(1), ids(5))
  cache, _ = jitted.extend(cache, ids(1, 1, 0))
  ledger, info, copies = jitted.ledger.extend(ledger, ids(1, 1, 0))
  chex.assert_trees_all_equal(ledger, cache.ledger)
  assert copies.sources[:, 0].tolist() == [1, 8, 8]  # row 0 copies page 1, row 1 keeps it
  assert int(info.num_free) == 2


def test_extending_all_rows_at_once_equals_extending_them_one_by_one():
  cache, _ = extend(empty(num_rows=5, num_pages=9), 6, 0, 3, 0, 0)
  cache, _ = jitted.fork(cache, ids(0, 0, 2), ids(1, 3, 4))
  ledger = cache.ledger
  together, info, _ = jitted.ledger.extend(ledger, ids(1, 3, 2, 1, 4))
  one_by_one = ledger
  for row, count in enumerate((1, 3, 2, 1, 4)):
    alone = jnp.zeros(5, jnp.int32).at[row].set(count)
    one_by_one, each, _ = jitted.ledger.extend(one_by_one, alone)
    assert bool(each.ok[row]) == bool(info.ok[row])
  chex.assert_trees_all_equal(together, one_by_one)


def test_equal_histories_give_equal_ledgers_under_vmap_and_scan():
  def story(ledger):
    ledger, *_ = ledger_lib.extend(ledger, ids(5, 9, 1))
    ledger, _ = ledger_lib.reorder(ledger, ids(1, 1, 0))
    ledger, *_ = ledger_lib.extend(ledger, ids(3, 3, 3))
    return ledger

  ledger = ledger_lib.init(config(num_pages=20))
  plain = story(ledger)
  chex.assert_trees_all_equal(plain, jax.jit(story)(ledger))
  both = jax.jit(jax.vmap(story))(jax.tree.map(lambda x: jnp.stack([x, x]), ledger))
  chex.assert_trees_all_equal(plain, jax.tree.map(lambda x: x[1], both))
  scanned, _ = jax.lax.scan(lambda x, _: (story(x), None), ledger, None, length=1)
  chex.assert_trees_all_equal(plain, scanned)


def test_an_unshare_copies_only_what_others_hold():
  cache, _ = extend(empty(), 10, 0, 0)
  cache, _ = jitted.fork(cache, ids(0), ids(1), ids(8))
  cache, info = jitted.unshare(cache, ids(10, 5, 0))
  assert info.ok.all()
  assert pages_of(cache, 0) == [0, 1, 2] and pages_of(cache, 1) == [0, 3]


def test_an_unshare_copies_a_page_whose_place_in_its_row_is_beyond_the_number_of_pages():
  cache = empty(num_pages=3, num_rows=2)
  for length in (8, 16, 24):
    cache, _ = jitted.slide(cache, ids(max(length - 9, 0), 0))
    cache, _ = extend(cache, 8, 0)
    cache, _ = write(cache, 0, [length] * 8, start=length - 8)
    cache, _ = jitted.slide(cache, ids(length - 1, 0))
  cache, _ = jitted.fork(cache, ids(0), ids(1))
  _, _, copies = jitted.ledger.unshare(cache.ledger, ids(24, 23))
  assert copies.num_pages.tolist() == [0, 1] and int(copies.first[1]) == 5
  cache, info = jitted.unshare(cache, ids(24, 23))
  assert info.ok.all() and pages_of(cache, 0) != pages_of(cache, 1)
  assert read(cache, 1) == [0] * 23 + [24]
