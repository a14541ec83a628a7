"""The faults of the seed that live at this level, each by its name."""

import jax.numpy as jnp
import numpy as np
import pytest
from story import config, empty, extend, ids, pages_of, read, write

from paged_jax import jitted
from paged_jax.testing import invariants

FIVE = [1, 2, 3, 4, 5]


def parent_and_child(**fields):
  """Row 0 holds five tokens in pages 0 and 1; row 1 is its fork."""
  cache, _ = extend(empty(**fields), 5, 0, 0)
  cache, _ = write(cache, 0, FIVE)
  cache, info = jitted.fork(cache, ids(0), ids(1))
  assert info.ok.all()
  return cache


def test_swap_out_and_swap_in_move_the_bytes():
  cache, _ = extend(empty(), 6, 0, 0)
  cache, _ = write(cache, 0, [*FIVE, 6])
  cache, image, info = jitted.swap_out(cache, jnp.int32(0))
  assert bool(info.ok) and int(info.num_free) == 8
  cache, _ = extend(cache, 0, 7, 0)  # somebody else reuses the pages
  cache, _ = write(cache, 1, [9] * 7)
  cache, info = jitted.swap_in(cache, jnp.int32(2), image)
  assert bool(info.ok)
  assert read(cache, 2) == [*FIVE, 6]
  invariants.check(cache)


def test_copy_on_write_copies_the_bytes():
  cache = parent_and_child()
  cache, ok = extend(cache, 0, 1, 0)
  assert ok == [True] * 3
  assert pages_of(cache, 0) == [0, 1] and pages_of(cache, 1) == [0, 2]
  assert read(cache, 1) == [*FIVE, 0]


def test_extend_keeps_the_copy_and_gives_the_old_page_back():
  cache = parent_and_child()
  cache, _ = extend(cache, 0, 1, 0)
  assert cache.ledger.pool.refcount.tolist()[:4] == [2, 1, 1, 0]


def test_copy_on_write_fires_for_the_shared_tail_that_is_written_not_only_for_a_new_page():
  cache = parent_and_child()
  np.testing.assert_array_equal(jitted.pages_needed(cache, ids(1, 0, 0)), [1, 0, 0])
  cache, _ = extend(cache, 1, 0, 0)
  assert pages_of(cache, 0) != pages_of(cache, 1)


def test_sharers_that_write_do_not_corrupt_each_other():
  cache = parent_and_child()
  cache, _ = extend(cache, 2, 2, 0)
  cache, _ = write(cache, 0, [60, 70], start=5)
  cache, _ = write(cache, 1, [80, 90], start=5)
  assert read(cache, 0) == [*FIVE, 60, 70]
  assert read(cache, 1) == [*FIVE, 80, 90]


def test_a_write_into_a_shared_page_without_extend_is_dropped_and_reported():
  cache = parent_and_child()
  cache, ok = write(cache, 1, [99], start=4)
  assert ok == [False]
  assert read(cache, 0) == FIVE


def test_clone_and_release_leave_nothing_behind():
  cache = parent_and_child()
  for _ in range(3):
    cache, _ = jitted.free(cache, jnp.array([False, True, False]))
    cache, _ = jitted.fork(cache, ids(0), ids(1))
  cache, info = jitted.free(cache, jnp.array([True, True, False]))
  assert int(info.num_free) == 8
  invariants.check(cache)


def test_a_refcount_never_goes_below_zero():
  cache, _ = extend(empty(), 1, 0, 0)
  cache, info = jitted.free(cache, jnp.array([True, False, False]))
  cache, info = jitted.free(cache, jnp.array([True, False, False]))
  assert info.ok.tolist() == [False, True, True]
  cache, info = jitted.drop(cache, ids(0, 7, -1, 9))
  assert not info.ok.any()
  assert int(cache.ledger.pool.refcount.min()) == 0
  invariants.check(cache)


def test_sharing_from_a_released_source_is_refused():
  cache, _ = jitted.free(parent_and_child(), jnp.array([True, True, False]))
  cache, info = jitted.fork(cache, ids(0), ids(2), ids(5))
  assert info.ok.tolist() == [False]
  cache, info = jitted.adopt(cache, ids(2), ids(0, 1)[None], ids(5))
  assert info.ok.tolist() == [False]
  assert int(cache.lengths[2]) == 0


def test_sharing_over_a_targets_own_pages_is_refused_and_leaks_nothing():
  cache, _ = extend(parent_and_child(), 0, 0, 3)
  before = cache.ledger.pool.refcount.tolist()
  cache, info = jitted.fork(cache, ids(0), ids(2))
  assert info.ok.tolist() == [False]
  assert cache.ledger.pool.refcount.tolist() == before


def test_dropping_a_held_prefix_frees_its_pages():
  cache, _ = extend(empty(), 5, 0, 0)
  cache, info = jitted.hold(cache, ids(0, 1))
  cache, info = jitted.free(cache, jnp.array([True, False, False]))
  assert int(info.num_free) == 6
  cache, info = jitted.drop(cache, ids(1, 0))
  assert int(info.num_free) == 8


def test_a_held_prefix_survives_its_owner():
  cache, _ = write(extend(empty(), 5, 0, 0)[0], 0, FIVE)
  cache, _ = jitted.hold(cache, ids(0, 1))
  cache, _ = jitted.free(cache, jnp.array([True, False, False]))
  cache, info = jitted.adopt(cache, ids(1), ids(0, 1)[None], ids(5))
  assert info.ok.tolist() == [True]
  assert read(cache, 1) == FIVE


def test_a_reused_page_does_not_show_the_former_tenants_values():
  cache, _ = write(extend(empty(num_pages=2), 8, 0, 0)[0], 0, [9] * 8)
  cache, _ = jitted.free(cache, jnp.array([True, False, False]))
  cache, _ = extend(cache, 0, 8, 0)
  assert read(cache, 1) == [0] * 8


def test_a_partial_fork_does_not_show_what_its_parent_wrote_further_on():
  cache, _ = write(extend(empty(), 7, 0, 0)[0], 0, [9] * 7)
  cache, _ = jitted.fork(cache, ids(0), ids(1), ids(5))
  cache, _ = extend(cache, 0, 2, 0)  # a copy
  assert read(cache, 1) == [9] * 5 + [0] * 2
  cache, _ = jitted.fork(cache, ids(0), ids(2), ids(5))
  cache, _ = jitted.free(cache, jnp.array([True, False, False]))
  cache, _ = extend(cache, 0, 0, 3)  # no copy: the parent is gone
  assert read(cache, 2) == [9] * 5 + [0] * 3


def test_a_fork_of_more_tokens_than_its_parent_holds_is_refused_even_on_the_same_page():
  cache, _ = write(extend(empty(), 5, 0, 0)[0], 0, [9] * 5)
  cache, info = jitted.fork(cache, ids(0), ids(1), ids(6))
  assert info.ok.tolist() == [False] and cache.lengths.tolist() == [5, 0, 0]


def test_a_fork_of_all_but_one_token_does_not_show_it_once_its_parent_is_gone():
  cache, _ = write(extend(empty(), 6, 0, 0)[0], 0, [9] * 6)
  cache, _ = jitted.fork(cache, ids(0), ids(1), ids(5))
  cache, _ = jitted.free(cache, jnp.array([True, False, False]))
  cache, _ = extend(cache, 0, 1, 0)
  assert read(cache, 1) == [9] * 5 + [0]


def test_a_trimmed_token_does_not_come_back():
  cache, _ = write(extend(empty(), 7, 0, 0)[0], 0, [9] * 7)
  cache, _ = jitted.trim(cache, ids(5, 0, 0))
  cache, _ = extend(cache, 3, 0, 0)
  assert read(cache, 0) == [9] * 5 + [0] * 3


def test_a_swapped_row_does_not_keep_pointing_at_freed_pages():
  cache, _, _ = jitted.swap_out(parent_and_child(), jnp.int32(0))
  assert pages_of(cache, 0) == [] and int(cache.lengths[0]) == 0
  assert read(cache, 1) == FIVE
  invariants.check(cache)


def test_a_swap_in_that_does_not_fit_changes_nothing_and_keeps_the_image():
  cache, _ = write(extend(empty(num_pages=3), 9, 0, 0)[0], 0, [7] * 9)
  cache, image, _ = jitted.swap_out(cache, jnp.int32(0))
  cache, _ = extend(cache, 0, 1, 0)
  before = cache.ledger.pool.refcount.tolist()
  cache, info = jitted.swap_in(cache, jnp.int32(0), image)
  assert not bool(info.ok) and cache.ledger.pool.refcount.tolist() == before
  cache, _ = jitted.free(cache, jnp.array([False, True, False]))
  cache, info = jitted.swap_in(cache, jnp.int32(0), image)
  assert bool(info.ok) and read(cache, 0) == [7] * 9


def test_unborn_pages_count_as_free():
  assert int(empty().num_free) == 8


def test_what_fits_is_accepted_and_pages_needed_says_so():
  cache = empty()
  np.testing.assert_array_equal(jitted.pages_needed(cache, ids(16, 16, 0)), [4, 4, 0])
  cache, ok = extend(cache, 16, 16, 0)
  assert ok == [True] * 3 and int(cache.num_free) == 0


def test_a_refused_extend_takes_nothing():
  cache, _ = extend(empty(num_pages=5), 16, 0, 0)
  table = np.asarray(cache.block_tables)
  cache, ok = extend(cache, 0, 16, 0)
  assert ok == [True, False, True] and int(cache.num_free) == 1
  np.testing.assert_array_equal(cache.block_tables, table)
  cache, info = jitted.free(cache, jnp.array([True, False, False]))
  assert int(info.num_free) == 5


def test_growth_by_three_with_one_free_keeps_exactly_the_old_mappings():
  cache, _ = extend(empty(num_pages=3), 8, 0, 0)
  cache, ok = extend(cache, 12, 0, 0)
  assert ok == [False, True, True]
  assert pages_of(cache, 0) == [0, 1] and int(cache.lengths[0]) == 8


def test_a_cache_of_one_page_works():
  cache, ok = extend(empty(num_pages=1, num_rows=1), 4)
  cache, _ = write(cache, 0, [1, 2, 3, 4])
  assert ok == [True] and read(cache, 0) == [1, 2, 3, 4]
  cache, ok = extend(cache, 1)
  assert ok == [False]


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_follow_the_real_dtype(dtype, num_bytes):
  cache = empty(dtype=dtype)
  assert config(dtype=dtype).page_bytes == 2 * 2 * 4 * 2 * 2 * num_bytes
  assert cache.pages.kv.nbytes == 8 * config(dtype=dtype).page_bytes


def test_page_zero_and_the_last_page_are_usable():
  cache, _ = extend(empty(), 4, 24, 4)
  assert pages_of(cache, 0) == [0] and pages_of(cache, 2) == [7]
  cache, _ = write(cache, 0, [1, 2, 3, 4])
  cache, _ = write(cache, 2, [5, 6, 7, 8])
  assert read(cache, 0) == [1, 2, 3, 4] and read(cache, 2) == [5, 6, 7, 8]


def test_holes_left_by_a_window_are_not_filled():
  cache, _ = write(extend(empty(), 12, 0, 0)[0], 0, list(range(1, 13)))
  cache, _ = jitted.slide(cache, ids(9, 0, 0))
  assert np.asarray(cache.block_tables[0])[:3].tolist() == [8, 8, 2]
  cache, _ = extend(cache, 1, 8, 0)
  assert np.asarray(cache.block_tables[0])[:4].tolist() == [8, 8, 2, 3]
  assert read(cache, 0) == [0] * 9 + [10, 11, 12, 0]
  invariants.check(cache)


def test_a_token_beyond_the_length_is_not_written():
  cache, _ = extend(empty(), 2, 0, 0)
  cache, ok = write(cache, 0, [1, 2, 3])
  assert ok == [True, True, False]
  cache, _ = extend(cache, 1, 0, 0)
  assert read(cache, 0) == [1, 2, 0]


def test_six_tokens_over_two_pages_read_back_and_the_other_layer_is_zero():
  cache, _ = extend(empty(), 6, 0, 0)
  plan = jitted.plan(cache, ids(*[0] * 6), jnp.arange(6, dtype=jnp.int32))
  k = jnp.arange(24, dtype=jnp.float32).reshape(6, 2, 2) + 1
  cache = jitted.write(cache, 0, k, -k, plan)
  got_k, got_v = jitted.gather(cache, 0, ids(0), num_tokens=6)
  np.testing.assert_array_equal(got_k[0], k)
  np.testing.assert_array_equal(got_v[0], -k)
  assert not np.any(jitted.gather(cache, 1, ids(0))[0])


def test_ten_cycles_of_use_leave_nothing():
  cache = empty()
  for cycle in range(10):
    cache, _ = extend(cache, 5, 9, cycle)
    cache, _ = jitted.free(cache, cache.lengths > 0)
  assert int(cache.num_free) == 8
  invariants.check(cache)


def test_the_last_of_several_sharers_keeps_the_page():
  cache = parent_and_child()
  cache, _ = jitted.fork(cache, ids(0), ids(2))
  np.testing.assert_array_equal(jitted.pages_needed(cache, ids(1, 1, 1)), [1, 1, 0])
  cache, ok = extend(cache, 1, 1, 1)
  assert ok == [True] * 3 and pages_of(cache, 2) == [0, 1]


def test_behind_a_refused_row_rows_that_need_a_page_wait_and_others_do_not():
  cache, _ = extend(empty(num_pages=3), 4, 2, 4)
  cache, ok = extend(cache, 1, 2, 1)
  assert ok == [False, True, False]
  cache, _ = jitted.trim(cache, ids(4, 4, 0))
  cache, ok = extend(cache, 5, 1, 0)
  assert ok == [False, False, True] and int(cache.num_free) == 1


def test_no_copy_on_write_shares_whole_pages_only():
  cache, _ = write(extend(empty(copy_on_write=False), 6, 0, 0)[0], 0, [*FIVE, 6])
  cache, info = jitted.fork(cache, ids(0, 0), ids(1, 2), ids(5, 4))
  assert info.ok.tolist() == [False, True]
  cache, ok = extend(cache, 1, 0, 1)
  assert ok == [True] * 3
  cache, info = jitted.hold(cache, ids(1))
  cache, ok = extend(cache, 1, 0, 1)
  assert ok == [False, True, True]
  invariants.check(cache)
