"""The ledger alone: it runs without bytes, agrees with the cache's, and its audit finds each fault."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from story import config, empty, extend, ids, pages_of, read, write

import paged_jax
from paged_jax import jitted
from paged_jax import ledger as ledger_lib
from paged_jax.testing import invariants


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


def broken(ledger, part, **changes):
  return dataclasses.replace(
    ledger, **{part: dataclasses.replace(getattr(ledger, part), **changes)}
  )


FAULTS = {
  "refcounts": lambda x: broken(x, "pool", refcount=x.pool.refcount.at[0].add(1)),
  "holds": lambda x: broken(x, "pool", holds=x.pool.holds.at[7].set(-1)),
  "bitmap": lambda x: broken(x, "pool", free=x.pool.free ^ 1),
  "num_free": lambda x: broken(x, "pool", num_free=x.pool.num_free - 1),
  "cursor": lambda x: broken(x, "pool", cursor=jnp.int32(8)),
  "tables": lambda x: broken(x, "tables", block_tables=x.tables.block_tables.at[1, 0].set(0)),
  "rows": lambda x: broken(x, "tables", starts=x.tables.starts.at[0].set(6)),
}


@pytest.mark.parametrize("law", FAULTS)
def test_audit_finds_each_broken_law(law):
  cache, _ = extend(empty(), 5, 0, 0)
  assert all(int(count) == 0 for count in jitted.audit(cache))
  invariants.check(cache)
  fault = FAULTS[law](cache.ledger)
  assert int(getattr(jitted.ledger.audit(fault), law)) > 0
  with pytest.raises(AssertionError, match=law):
    invariants.check(fault)


def test_bits_beyond_the_last_page_are_audited_too():
  cache, _ = extend(empty(), 5, 0, 0)
  fault = broken(cache.ledger, "pool", free=cache.ledger.pool.free | jnp.uint32(1 << 31))
  assert int(jitted.ledger.audit(fault).bitmap) == 1


@pytest.mark.parametrize("num_pages", [9, 40])
@pytest.mark.parametrize("seed", range(6))
def test_replaying_a_log_of_extends_equals_extending_step_by_step(seed, num_pages):
  rng = np.random.default_rng(seed)
  ledger = jitted.ledger.init(config(num_rows=5, num_pages=num_pages))
  ledger, *_ = jitted.ledger.extend(ledger, jnp.asarray(rng.integers(0, 9, 5), jnp.int32))
  if seed % 2:  # tail pages are shared
    ledger, _ = jitted.ledger.reorder(ledger, jnp.asarray(rng.integers(0, 5, 5), jnp.int32))
  steps = rng.integers(-1 if seed == 4 else 0, 3, (6, 5)).astype(np.int32)
  expected = ledger
  for step in steps:
    expected, *_ = jitted.ledger.extend(expected, jnp.asarray(step))
  replayed = jitted.ledger.replay(ledger, paged_jax.Log(((steps,),), ("extend",)))
  chex.assert_trees_all_equal(replayed, expected)


def test_replaying_a_log_of_several_verbs_runs_them_in_order_at_each_step():
  ledger = jitted.ledger.init(config())
  grown, lengths = np.array([[5, 1, 0], [2, 0, 4]]), np.array([[3, 0, 0], [5, 0, 2]])
  expected = ledger
  for more, kept in zip(grown, lengths):
    expected, *_ = jitted.ledger.extend(expected, ids(*more))
    expected, _ = jitted.ledger.trim(expected, ids(*kept))
  log = paged_jax.Log(((grown,), (lengths,)), ("extend", "trim"))
  chex.assert_trees_all_equal(jitted.ledger.replay(ledger, log), expected)
  assert expected.tables.lengths.tolist() == [5, 0, 2]


def test_a_log_of_what_is_no_verb_is_refused():
  with pytest.raises(ValueError, match=r"log.verbs must be of .*got \('grow',\)"):
    ledger_lib.replay(ledger_lib.init(config()), paged_jax.Log(((ids(1),),), ("grow",)))
