"""The faults of the seed that live in the manager, each by its name."""

import contextlib
import threading
import types

import numpy as np
import pytest
from managed import FIVE, SIX, Clock, begin, check_bytes, fill, grow, manager, refused, store

import paged_jax
from paged_jax import jitted
from paged_jax.host import Level, Request, errors, eviction
from paged_jax.testing import replay

# Data


def test_swap_out_and_swap_in_move_the_bytes():
  m = manager()
  handle = begin(m, SIX)
  m.swap_out(handle)
  begin(m, [9] * 24, "b"), begin(m, [9] * 8, "c")  # every page is somebody else's now
  m.deallocate("b")
  m.swap_in(handle)
  check_bytes(m, handle, SIX)


def test_copy_on_write_copies_the_bytes():
  m = manager()
  parent = begin(m, FIVE)
  child = parent.clone("b")
  assert m.cow_copy(child) == [2, 3]
  m.deallocate("a")
  check_bytes(m, child, FIVE)


def test_extend_keeps_the_copy_and_gives_the_old_page_back():
  m = manager()
  parent = begin(m, FIVE)
  grow(m, parent.clone("b"), SIX)
  m.deallocate("b")
  assert m.stats().free_pages == 6 and not parent.is_shared and m.stats().copies == 1


def test_copy_on_write_fires_for_the_shared_tail_that_is_written_not_only_for_a_new_page():
  m = manager()
  parent = begin(m, FIVE)
  child = parent.clone("b")
  m.extend(child, 1)  # stays in the second page
  assert parent.pages == [0, 1] and child.pages == [0, 2]


def test_sharers_that_write_do_not_corrupt_each_other():
  m = manager()
  parent = begin(m, FIVE)
  child = parent.clone("b")
  grow(m, parent, [*FIVE, 6, 7])
  grow(m, child, [*FIVE, 8, 9])
  fill(m, child, [0, 2, 3, 4, 5, 8, 9], 0)  # and what was shared whole
  check_bytes(m, parent, [*FIVE, 6, 7])
  check_bytes(m, child, [0, 2, 3, 4, 5, 8, 9])


# Lifetime


def test_clone_and_release_leave_nothing_behind():
  m = manager()
  parent = begin(m, FIVE)
  for _ in range(4):
    child = parent.clone("b")
    m.deallocate("b")
    assert not child.is_valid and m.stats().free_pages == 6
  m.deallocate("a")
  assert m.stats().free_pages == 8 and m.audit().clean


def test_a_refcount_never_goes_below_zero():
  m = manager()
  begin(m, FIVE).clone("b")
  m.deallocate_many(["a", "b"])
  for name in "ab":
    with refused(m, errors.UnknownRequest):
      m.deallocate(name)
  assert int(m.cache.ledger.pool.refcount.min()) == 0 and m.stats().pages_released == 2


def test_a_handle_does_not_work_after_release_even_if_its_id_lives_again():
  m = manager()
  old = begin(m, FIVE)
  m.deallocate("a")
  new = begin(m, SIX)
  with refused(m, errors.StaleHandle):
    m.extend(old, 1)
  check_bytes(m, new, SIX)


def test_sharing_from_a_released_source_is_refused():
  m = manager()
  source, target = begin(m, FIVE), m.allocate(Request("b"))
  m.deallocate("a")
  begin(m, [9] * 24, "c")
  with refused(m, errors.StaleHandle):
    m.share_prefix(source, target, 5)
  assert target.pages == []


def test_sharing_over_a_targets_own_pages_is_refused_and_leaks_nothing():
  m = manager()
  source, target = begin(m, FIVE), begin(m, [9], "b")
  with refused(m, errors.NotEmpty):
    m.share_prefix(source, target, 5)
  check_bytes(m, target, [9])
  m.deallocate_many(["a", "b"])
  assert m.stats().free_pages == 8


def test_a_prefix_hit_never_returns_another_requests_data():
  m = manager()
  store(m, FIVE)
  begin(m, [9] * 20, "b")  # may not land on the prefix's pages
  handle = m.allocate(Request("c", tokens=[*FIVE, 7]))
  assert handle.num_cached == 5
  fill(m, handle, [*FIVE, 7], 5)
  check_bytes(m, handle, [*FIVE, 7])


def test_evicting_a_prefix_frees_its_pages():
  m = manager()
  store(m, FIVE)
  assert m.stats().free_pages == 6 and m.evict_prefixes(1) == 1
  assert m.stats().free_pages == 8


def test_evicting_a_prefix_that_shares_pages_frees_only_its_own():
  m = manager()
  store(m, [1, 2, 3, 4, 5])
  store(m, [1, 2, 3, 4, 6], "b")
  assert m.stats().free_pages == 5  # one shared page, two tails
  m.evict_prefixes(1)
  assert m.stats().free_pages == 6
  handle = m.allocate(Request("c", 5, tokens=[1, 2, 3, 4, 6, 7]))
  check_bytes(m, handle, [1, 2, 3, 4, 6])


def test_a_reused_page_does_not_show_the_former_tenants_values():
  m = manager()
  m.allocate_many([Request("a", 24), Request("b", 8)])
  for handle in m.list_handles():
    fill(m, handle, [9] * handle.num_tokens, 0)
  m.deallocate_many(["a", "b"])
  handle = m.allocate(Request("c", 24))
  assert not np.any(m.read_kv(handle, 0, 0, 24)) and not np.any(m.read_kv(handle, 1, 0, 24))


def test_a_hits_last_page_does_not_show_what_its_owner_wrote_further_on():
  m = manager()
  store(m, [9] * 8)
  handle = m.allocate(Request("b", 8, tokens=[9] * 5))
  assert handle.num_cached == 4
  handle = m.allocate(Request("c", 8, tokens=[9] * 6))
  assert handle.num_cached == 5 and not np.any(m.read_kv(handle, 0, 5, 3))


def test_a_trimmed_token_does_not_come_back():
  m = manager()
  handle = begin(m, [9] * 7)
  m.trim(handle, 5)
  m.extend(handle, 3)
  assert not np.any(m.read_kv(handle, 0, 5, 3))
  m.trim(handle, 5)
  check_bytes(m, handle, [9] * 5)


# Swap


def test_a_swapped_sequence_does_not_point_at_freed_pages():
  m = manager()
  handle = begin(m, SIX)
  m.swap_out(handle)
  with refused(m, errors.SwappedOut):
    _ = handle.pages
  other = begin(m, [9] * 8, "b")
  m.swap_in(handle)
  assert not set(handle.pages) & set(other.pages)
  check_bytes(m, other, [9] * 8)


def test_a_page_shared_by_several_swapped_sequences_moves_once():
  m = manager()
  parent = begin(m, SIX)
  handles = [parent, parent.clone("b"), parent.clone("c")]
  m.swap_out_many(handles)
  assert m.stats().free_host_pages == 14 and m.stats().pages_swapped_out == 2
  m.swap_in_many(handles)
  assert m.stats().free_pages == 6 and m.stats().pages_swapped_in == 2
  for handle in handles:
    check_bytes(m, handle, SIX)


def test_a_host_page_that_is_gone_takes_no_device_page():
  m = manager()
  handle = begin(m, SIX)
  m.swap_out(handle)
  m.deallocate("a")
  with refused(m, errors.StaleHandle):
    m.swap_in(handle)
  assert m.stats().free_pages == 8 and m.stats().free_host_pages == 16


def broken(name):
  """The verbs, one of which fails as if the device had no memory left."""

  def fail(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED")

  return types.SimpleNamespace(**(vars(jitted) | {name: fail}))


def test_a_swap_out_that_fails_half_way_loses_no_page_and_no_byte():
  m = manager()
  handle = begin(m, SIX)
  m._state.verbs = broken("offload")
  with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
    m.swap_out(handle)
  m._state.verbs = jitted
  assert m.audit().clean
  if handle.is_swapped:
    m.swap_in(handle)
  check_bytes(m, handle, SIX)
  m.deallocate("a")
  assert m.stats().free_pages == 8 and m.stats().free_host_pages == 16


def test_a_swap_in_that_fails_half_way_changes_nothing():
  m = manager()
  handle = begin(m, SIX)
  m.swap_out(handle)
  before = m.stats()
  m._state.verbs = broken("restore")
  with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
    m.swap_in(handle)
  m._state.verbs = jitted
  assert m.audit().clean and handle.is_swapped and m.stats() == before
  m.swap_in(handle)
  check_bytes(m, handle, SIX)


def test_releasing_a_swapped_sequence_frees_its_host_pages():
  m = manager()
  m.swap_out(begin(m, SIX))
  assert m.stats().free_host_pages == 14
  m.deallocate("a")
  assert m.stats().free_host_pages == 16


def test_evicting_a_spilled_prefix_frees_its_host_pages():
  m = manager(dict(spill=True))
  store(m, SIX)
  m.gc(8)
  assert m.stats().free_pages == 8 and m.stats().free_host_pages == 14
  assert m.find_prefix(SIX).length == 6
  m.clear_prefixes()
  assert m.stats().free_host_pages == 16 and m.audit().clean


def test_a_spilled_prefix_comes_back_bit_for_bit():
  m = manager(dict(spill=True))
  store(m, SIX, last_logits="L")
  m.gc(8)
  handle = m.allocate(Request("b", tokens=SIX))
  assert handle.num_cached == 6 and handle.last_logits == "L" and m.stats().pages_swapped_in == 2
  check_bytes(m, handle, SIX)


# Accounting


def test_unborn_pages_count_as_free_so_a_new_pool_is_at_low_pressure():
  m = manager()
  assert m.check_pressure() is Level.LOW and m.stats().free_pages == 8 == m.free_pages


def test_can_allocate_is_true_for_what_fits_exactly():
  m = manager()
  m.allocate(Request("a", 24))
  assert m.can_allocate(Request("b", 8)) and not m.can_allocate(Request("b", 9))
  assert m.allocate(Request("b", 8)).num_tokens == 8


@pytest.mark.parametrize("tokens", [None, [*range(20)]], ids=["fresh", "after a hit"])
def test_a_failed_allocate_leaks_nothing(tokens):
  m = manager()
  store(m, [*range(4)], pinned=True)
  m.allocate(Request("b", 20))
  with refused(m, errors.OutOfPages):
    m.allocate(Request("c", 20, tokens=tokens))
  m.deallocate("b")
  m.clear_prefixes()
  assert m.stats().free_pages == 8


def test_gc_can_evict():
  m = manager()
  store(m, [*range(24)])
  assert m.gc(8).num_pages == 6 and m.stats().free_pages == 8


def test_the_same_request_id_twice_leaks_nothing():
  m = manager()
  begin(m, FIVE)
  with refused(m, errors.DuplicateRequest):
    m.allocate(Request("a", 24))
  m.deallocate("a")
  assert m.stats().free_pages == 8


def test_errors_on_release_are_not_swallowed():
  m = manager()
  with refused(m, errors.UnknownRequest, "there is no request 'a'"):
    m.deallocate("a")


def test_a_manager_of_one_page_works():
  m = manager(num_pages=1)
  assert m.check_pressure() is Level.LOW
  store(m, [1, 2, 3, 4], last_logits="L")
  assert m.check_pressure() is Level.CRITICAL
  handle = m.allocate(Request("b", tokens=[1, 2, 3, 4]))
  assert handle.pages == [0] and handle.last_logits == "L"
  check_bytes(m, handle, [1, 2, 3, 4])
  m.deallocate("b")
  handle = begin(m, [7], "c")  # evicts
  check_bytes(m, handle, [7])
  m.swap_out(handle)
  m.swap_in(handle)
  check_bytes(m, handle, [7])


# Stats


def test_the_hit_rate_is_right_after_misses():
  m = manager()
  store(m, FIVE)  # its own lookup misses
  for tokens in (FIVE, [9], [8], [*FIVE, 1]):
    m.find_prefix(tokens)
  assert m.prefix_stats()[:3] == (5, 2, 3) and m.prefix_stats().hit_rate == 0.4


def test_failures_are_counted():
  m = manager(dict(num_host_pages=0))
  handle = m.allocate(Request("a", 24))
  attempts = [
    lambda: m.allocate(Request("b", 12)),
    lambda: m.allocate_many([Request(i) for i in range(3)]),
    lambda: m.swap_out(handle),
  ]
  for attempt in attempts:
    with pytest.raises(errors.CacheError):
      attempt()
  assert m.stats().refusals == 3
  m.can_allocate(Request("b", 12))
  assert m.stats().refusals == 3 and m.stats().allocations == 1


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_follow_the_real_dtype(dtype, num_bytes):
  m = manager(dtype=dtype)
  assert m.stats().page_bytes == 2 * 2 * 4 * 2 * 2 * num_bytes
  assert m.stats().page_bytes * 8 == m.cache.pages.kv.nbytes


def test_utilization_is_never_above_one():
  m = manager()
  parent = m.allocate(Request("a", 24))
  child = parent.clone("b")
  m.slide(child, 24)
  assert m.stats().utilization == 6 / 8 and parent.stats().utilization == 1.0
  assert child.stats().utilization == 0.0


# Tables


def test_page_zero_is_usable():
  m = manager()
  handle = begin(m, [1, 2, 3])
  assert handle.pages == [0]
  check_bytes(m, handle, [1, 2, 3])


def test_holes_left_by_a_window_are_not_overwritten():
  m = manager()
  tokens = [*range(12)]
  handle = begin(m, tokens)
  m.slide(handle, 9)
  grow(m, handle, [*tokens, 12])
  assert handle.pages == [2, 3] and handle.page_at(3) == 3
  check_bytes(m, handle, [*tokens, 12], start=9)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim"])
def test_the_shape_of_a_request_is_checked(field):
  m = manager()
  with refused(m, errors.ShapeMismatch, f"{field} must be 2, got 1"):
    m.allocate(Request("a", 1, **{field: 1}))


def test_the_length_bounds_what_is_written_and_read():
  m = manager()
  handle = m.allocate(Request("a", 2))
  one = np.ones((2, 2, 2), np.float32)
  with refused(m, errors.UnmappedToken, "no token 2"):
    m.write_kv(handle, 0, 1, one, one)
  with refused(m, errors.UnmappedToken, "no token 2"):
    m.read_kv(handle, 0, 2, 1)
  m.extend(handle, 1)
  assert not np.any(m.read_kv(handle, 0, 0, 3))


# Concurrency


def finish(*targets):
  """Runs each in a thread; fails if one does not come to an end."""
  failures = []

  def guarded(target):
    try:
      target()
    except BaseException as error:
      failures.append(error)

  threads = [threading.Thread(target=guarded, args=(each,), daemon=True) for each in targets]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert not any(thread.is_alive() for thread in threads) and not failures


def test_no_order_of_calls_deadlocks():
  m = manager()
  a, b = begin(m, [1]), begin(m, [2], "b")
  m.on_pressure(lambda change: m.prefix_stats() and m.gc(1))

  def swap(handle):
    for _ in range(15):
      m.swap_out(handle)
      m.swap_in(handle)

  def look():
    for _ in range(30):
      m.store_prefix(m.get_handle("c"), [3])
      m.find_prefix([3]), m.evict_prefixes(1), m.stats(), m.list_handles(), m.events()
      m.clear_prefixes()

  begin(m, [3], "c")
  finish(lambda: swap(a), lambda: swap(b), look)
  for handle, token in ((a, 1), (b, 2), (m.get_handle("c"), 3)):
    check_bytes(m, handle, [token])
  assert m.audit().clean and m.stats().free_pages == 5


def test_a_callback_may_register_a_callback():
  m, seen = manager(), []

  def register(change):
    m.on_pressure(lambda later: seen.append(later.entered))

  m.on_pressure(register)
  finish(lambda: m.allocate_many([Request("a", 24), Request("b", 8)]), lambda: None)
  m.deallocate("a")
  assert seen == [Level.LOW]


# Prefix


def test_a_partial_hit_gets_no_logits():
  m = manager()
  store(m, FIVE, last_logits="L")
  assert m.find_prefix(FIVE).last_logits == "L"
  for tokens in (FIVE[:4], SIX, [1, 2, 3, 4, 9]):
    assert m.find_prefix(tokens).last_logits is None
    handle = m.allocate(Request("b", tokens=tokens))
    assert handle.last_logits is None and handle.num_cached < len(tokens)
    m.deallocate("b")


def test_a_capacity_of_zero_stores_nothing():
  m = manager(dict(max_prefixes=0))
  assert not store(m, FIVE)
  assert m.prefix_stats().entries == 0 and m.stats().free_pages == 8


def test_entries_in_use_are_not_evicted():
  m = manager(dict(max_prefixes=1))
  store(m, FIVE, last_logits="L")
  user = m.allocate(Request("b", tokens=FIVE))
  assert m.evict_prefixes(1) == 0 and m.gc(8).num_pages == 0
  assert not store(m, [9] * 4, "c")  # nor to make room for another
  assert m.find_prefix(FIVE).last_logits == "L"
  check_bytes(m, user, FIVE)
  m.deallocate("b")
  assert m.evict_prefixes(1) == 1


def test_a_page_poisoned_after_release_does_not_reach_the_next_owner():
  m = manager()
  begin(m, [9] * 8)
  m.deallocate("a")
  m._state.cache = replay.poison(m.cache)
  assert np.isnan(np.asarray(m.cache.pages.kv)).all()
  handle = begin(m, FIVE, "b")
  check_bytes(m, handle, FIVE)


def test_a_prefix_may_expire_while_it_is_being_allocated():
  clock = Clock()
  m = manager(dict(clock=clock), num_rows=5)
  store(m, SIX, last_logits="L", ttl=5)
  m.allocate(Request("b", 24))
  assert m.num_free == 0

  ticks = iter([4.5] + [6.0] * 100)
  m._pools.ends._clock = lambda: next(ticks)
  handle = m.allocate(Request("c", tokens=SIX))
  assert handle.num_tokens == 6 and m.audit().clean


def test_pages_of_what_a_lookup_found_expired_are_free_at_once():
  clock = Clock()
  m = manager(dict(clock=clock, spill=True), num_pages=12, num_rows=5)
  store(m, range(24), ttl=5)
  m.gc(9)  # three of six pages are in host memory
  clock.now = 10
  assert m.find_prefix([99] * 20).length == 0
  stats = m.stats()
  assert (stats.free_pages, stats.free_host_pages) == (12, 16) and m.audit().clean


def test_nothing_piles_up_while_there_is_room():
  clock = Clock()
  m = manager(dict(clock=clock), num_pages=40, num_rows=5)
  for n in range(200):
    clock.now = n
    store(m, [n, *SIX], ttl=3)
  evictable = m._pools.reclaims[0]._evictable
  assert not evictable._moved and not evictable._marked


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("nth", range(1, 12))
def test_a_policy_that_raises_loses_no_page(spill, nth):
  calls = []

  def rank(use):
    calls.append(use)
    if len(calls) == nth:
      raise RuntimeError("rank")
    return use.last

  m = manager(dict(eviction=eviction.Policy("broken", rank), spill=spill), num_rows=5)
  for n in range(4):
    store(m, [n, *FIVE])
  calls.clear()
  with contextlib.suppress(RuntimeError):
    m.gc(8)
  calls += [None] * 100
  assert m.audit().clean
  m.gc(8)
  assert m.free_pages == 8


def test_an_error_in_a_with_block_is_the_one_that_is_raised():
  with pytest.raises(KeyError), manager() as m:
    m.run(lambda cache: (cache, paged_jax.Log(((np.ones((1, 3)),),), ("grow",)), None))
    raise KeyError("the body's own")


def test_a_lifetime_that_is_no_number_is_refused():
  m = manager()
  handle = begin(m, FIVE)
  with pytest.raises(ValueError, match="ttl must be None or a number of seconds, got nan"):
    m.store_prefix(handle, ttl=float("nan"))
