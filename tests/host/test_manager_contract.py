"""Every row of the contract of the seed that is the manager's, on pages of four tokens."""

import contextlib
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from managed import Clock, check_bytes, fill, fingerprints, manager
from story import config

import paged_jax
from paged_jax.host import Level, ManagerConfig, Request, errors, eviction, tensors
from paged_jax.testing import replay

FIVE = [1, 2, 3, 4, 5]
SIX = [1, 2, 3, 4, 5, 6]
PAGE_BYTES = 2 * 2 * 4 * 2 * 2 * 4  # layers, heads, tokens, keys and values, head dim, float32
NARROW = dict(low_watermark=1.0, high_watermark=0.99)  # LOW: all free, HIGH: some, CRITICAL: none


def begin(m, tokens, name="a", **fields):
  """A live sequence, written."""
  handle = m.allocate(Request(name, tokens=tokens, **fields))
  fill(m, handle, tokens, handle.num_cached)
  return handle


def store(m, tokens, name="a", namespace=None, **fields):
  """A prefix that nobody uses."""
  stored = m.store_prefix(begin(m, tokens, name, namespace=namespace), **fields)
  m.deallocate(name)
  return stored


def ones(count):
  return np.ones((count, 2, 2), np.float32)


def state_of(m):
  """All that a refused call must leave as it was."""
  tables = {
    each.request_id: (each.cache_id, each.num_tokens, None if each.is_swapped else each.pages)
    for each in m.list_handles()
  }
  return tables, m.stats()._replace(refusals=0)


@contextlib.contextmanager
def refused(m, error, message=None):
  before = state_of(m)
  with pytest.raises(error, match=message) as caught:
    yield caught
  assert state_of(m) == before
  assert m.audit().clean


# Configuration


def test_defaults_are_the_seeds():
  options = ManagerConfig()
  assert (options.num_host_pages, options.max_prefixes, options.min_prefix_length) == (512, 100, 16)
  assert (options.low_watermark, options.high_watermark) == (0.3, 0.1)
  assert options.swapping and options.prefix_cache and options.eviction is eviction.LRU


@pytest.mark.parametrize(
  ("field", "value"),
  [
    *(("num_host_pages", x) for x in (-1, 1.5, True, None, "8")),
    *(("max_prefixes", x) for x in (-1, 1.5, True, None)),
    *(("min_prefix_length", x) for x in (0, -1, 1.5, True, None)),
    *(("event_buffer", x) for x in (0, -1, 1.5)),
    *(("low_watermark", x) for x in (-0.1, 1.1, float("nan"), "0.3", None, True)),
    *(("high_watermark", x) for x in (-0.1, 1.1, float("nan"), "0.1", None, 0.3, 0.5, False)),
  ],
)
def test_an_option_out_of_range_is_named_with_its_value(field, value):
  with pytest.raises(ValueError, match=f"{field}.*{value}"):
    ManagerConfig(**{field: value})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("eviction", "lru"),
    *((x, "yes") for x in ("swapping", "prefix_cache", "spill", "scrub", "canary")),
  ],
)
def test_an_option_of_another_type_is_named_with_its_value(field, value):
  with pytest.raises(ValueError, match=f"{field}.*{value}"):
    ManagerConfig(**{field: value})


def test_host_pages_or_spilling_without_swapping_are_refused():
  with pytest.raises(ValueError, match=r"num_host_pages.*swapping.*512"):
    ManagerConfig(swapping=False)
  with pytest.raises(ValueError, match="spill"):
    ManagerConfig(swapping=False, num_host_pages=0, spill=True)
  assert ManagerConfig(swapping=False, num_host_pages=0).num_host_pages == 0


def test_watermarks_reach_both_ends():
  assert ManagerConfig(low_watermark=1, high_watermark=0).low_watermark == 1


@pytest.mark.parametrize("field", ["num_host_pages", "max_prefixes", "min_prefix_length"])
def test_options_take_numpy_integers(field):
  assert getattr(ManagerConfig(**{field: np.int64(8)}), field) == 8


def test_kv_heads_and_head_dim_are_numbers_of_their_own():
  m = manager(num_pages=1, num_kv_heads=3)
  assert m.stats().page_bytes == 2 * 3 * 4 * 2 * 2 * 4


# Pool


def test_a_fresh_pool_is_all_free():
  stats = manager().stats()
  assert (stats.num_pages, stats.free_pages, stats.used_pages, stats.peak_pages) == (8, 8, 0, 0)
  assert (stats.pages_taken, stats.pages_released, stats.utilization) == (0, 0, 0.0)


def test_every_page_id_from_zero_on_is_usable():
  m = manager()
  a, b = m.allocate_many([Request("a", 24), Request("b", 8)])
  assert a.pages == [0, 1, 2, 3, 4, 5] and b.pages == [6, 7]
  for handle, tokens in ((a, [*range(24)]), (b, [*range(8)])):
    fill(m, handle, tokens, 0)
  check_bytes(m, a, [*range(24)])
  check_bytes(m, b, [*range(8)])


def test_stats_count_pages_taken_released_and_at_the_peak():
  m = manager()
  m.allocate(Request("a", 12))
  m.allocate(Request("b", 5))
  m.deallocate("a")
  stats = m.stats()
  assert (stats.free_pages, stats.used_pages, stats.peak_pages) == (6, 2, 5)
  assert (stats.pages_taken, stats.pages_released, stats.utilization) == (5, 3, 0.25)
  assert (stats.running, stats.swapped, stats.allocations, stats.deallocations) == (1, 0, 2, 1)


def test_pool_of_one_page():
  m = manager(num_pages=1, num_kv_heads=3)
  handle = m.allocate(Request("a", 4))
  assert handle.pages == [0] and m.check_pressure() is Level.CRITICAL
  with refused(m, errors.OutOfPages, "1 pages are needed, but 0 are free"):
    m.extend(handle, 1)
  m.deallocate("a")
  assert m.allocate(Request("b", 1)).pages == [0]


def test_keys_and_values_of_three_heads_and_two_columns_keep_their_axes():
  m = manager(num_pages=1, num_kv_heads=3)
  handle = m.allocate(Request("a", 4))
  k = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
  m.write_kv(handle, 1, 0, k, -k)
  got_k, got_v = m.read_kv(handle, 1, 1, 3)
  np.testing.assert_array_equal(got_k, k[1:])
  np.testing.assert_array_equal(got_v, -k[1:])


# Sequence handle


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_required_pages_at_sixteen_tokens(tokens, pages):
  handle = manager(page_size=16).allocate(Request("a"))
  assert handle.required_pages(tokens) == pages


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (24, 6)])
def test_a_sequence_has_the_pages_that_its_tokens_fill(tokens, pages):
  m = manager()
  handle = m.allocate(Request("a", np.int64(tokens)))
  assert handle.num_tokens == tokens and handle.pages == [*range(pages)]
  assert handle.stats().num_bytes == pages * PAGE_BYTES and m.stats().free_pages == 8 - pages
  assert handle.stats().utilization == (tokens / (4 * pages) if pages else 0)


def test_page_at_names_the_page_and_token_that_are_not_there():
  m = manager()
  m.allocate(Request("x", 4))
  handle = m.allocate(Request("a", 5))
  assert [handle.page_at(0), handle.page_at(np.int32(1))] == [1, 2]
  for page, token in ((2, 8), (6, 24), (-1, -4)):
    with refused(m, errors.UnmappedToken, rf"'a' holds no token {token} \(logical page {page}\)"):
      handle.page_at(page)


def test_a_clone_shares_all_pages_and_copies_nothing():
  m = manager()
  parent = begin(m, FIVE)
  assert not parent.is_shared
  child = parent.clone("b")
  assert child.pages == parent.pages == [0, 1] and child.is_shared and parent.is_shared
  assert child.cache_id != parent.cache_id and child.request_id == "b"
  assert m.stats().copies == 0 and m.stats().free_pages == 6
  m.deallocate("a")
  assert not child.is_shared
  check_bytes(m, child, FIVE)


def test_a_clone_inherits_length_limit_and_namespace():
  m = manager()
  parent = begin(m, FIVE, max_length=6, namespace="n")
  child = parent.clone("b")
  m.extend(child, 1)
  with refused(m, errors.TooLong, "'b' needs 7 tokens, but may hold 6"):
    m.extend(child, 1)
  m.store_prefix(child, FIVE)
  assert m.find_prefix(FIVE, "n").length == 5 and m.find_prefix(FIVE).length == 0


def test_a_clone_with_a_live_id_or_without_a_row_is_refused():
  m = manager()
  handle = m.allocate(Request("a", 5))
  with refused(m, errors.DuplicateRequest, "'a'"):
    handle.clone("a")
  handle.clone("b"), handle.clone("c")
  with refused(m, errors.OutOfRows, "1 rows are needed, but 0 are free"):
    handle.clone("d")


def test_cache_ids_are_never_used_again():
  m = manager()
  found = [m.allocate(Request("a", 1)).cache_id]
  found.append(m.get_handle("a").clone("b").cache_id)
  m.deallocate("a")
  found.append(m.allocate(Request("a", 1)).cache_id)
  assert len(set(found)) == 3


def test_numbers_of_a_sequence():
  clock = Clock()
  m = manager(dict(clock=clock))
  handle = begin(m, FIVE)
  clock.now = 7.0
  m.extend(handle, 0)
  clock.now = 9.0
  assert handle.stats() == (5, 2, 0, 2 * PAGE_BYTES, 5 / 8, 7.0)
  m.swap_out(handle)
  assert handle.stats() == (5, 0, 2, 2 * PAGE_BYTES, 5 / 8, 9.0)


STALE_USES = {
  "num_tokens": lambda m, old: old.num_tokens,
  "row": lambda m, old: old.row,
  "pages": lambda m, old: old.pages,
  "is_shared": lambda m, old: old.is_shared,
  "is_swapped": lambda m, old: old.is_swapped,
  "page_at": lambda m, old: old.page_at(0),
  "stats": lambda m, old: old.stats(),
  "clone": lambda m, old: old.clone("z"),
  "extend": lambda m, old: m.extend(old, 1),
  "extend by nothing": lambda m, old: m.extend(old, 0),
  "extend_many": lambda m, old: m.extend_many({m.get_handle("b"): 1, old: 1}),
  "trim": lambda m, old: m.trim(old, 0),
  "slide": lambda m, old: m.slide(old, 0),
  "share from": lambda m, old: m.share_prefix(old, m.get_handle("b"), 1),
  "share to": lambda m, old: m.share_prefix(m.get_handle("b"), old, 1),
  "cow_copy": lambda m, old: m.cow_copy(old),
  "write_kv": lambda m, old: m.write_kv(old, 0, 0, ones(1), ones(1)),
  "read_kv": lambda m, old: m.read_kv(old, 0, 0, 1),
  "store_prefix": lambda m, old: m.store_prefix(old, [1]),
  "swap_out": lambda m, old: m.swap_out(old),
  "swap_out_many": lambda m, old: m.swap_out_many([m.get_handle("b"), old]),
  "swap_in": lambda m, old: m.swap_in(old),
}


@pytest.mark.parametrize("reused", [False, True], ids=["gone", "id reused"])
@pytest.mark.parametrize("use", STALE_USES)
def test_every_use_of_a_released_handle_is_refused(use, reused):
  m = manager()
  old = begin(m, FIVE)
  m.allocate(Request("b", 1))
  m.deallocate("a")
  if reused:
    m.allocate(Request("a", 5))
  assert not old.is_valid
  with refused(m, errors.StaleHandle, rf"'a' \(cache id {old.cache_id}\)"):
    STALE_USES[use](m, old)


FOREIGN_USES = ("extend", "trim", "slide", "cow_copy", "write_kv", "read_kv", "store_prefix",
                "swap_out")  # fmt: skip


@pytest.mark.parametrize("use", FOREIGN_USES)
def test_a_handle_of_another_manager_is_refused(use):
  m = manager()
  foreign = manager().allocate(Request("a", 5))
  m.allocate(Request("a", 5))
  with refused(m, errors.StaleHandle, "'a'"):
    STALE_USES[use](m, foreign)


@pytest.mark.parametrize(
  "use",
  [
    lambda m, h: h.row,
    lambda m, h: h.pages,
    lambda m, h: h.is_shared,
    lambda m, h: h.page_at(0),
    lambda m, h: h.clone("z"),
    lambda m, h: m.extend(h, 1),
    lambda m, h: m.trim(h, 0),
    lambda m, h: m.slide(h, 0),
    lambda m, h: m.share_prefix(h, m.get_handle("b"), 1),
    lambda m, h: m.share_prefix(m.get_handle("b"), h, 0),
    lambda m, h: m.cow_copy(h),
    lambda m, h: m.write_kv(h, 0, 0, ones(1), ones(1)),
    lambda m, h: m.read_kv(h, 0, 0, 1),
    lambda m, h: m.store_prefix(h, [1]),
    lambda m, h: m.swap_out(h),
  ],
)
def test_a_swapped_sequence_refuses_what_needs_its_pages(use):
  m = manager()
  handle = begin(m, FIVE)
  m.allocate(Request("b"))
  m.swap_out(handle)
  assert handle.is_swapped and handle.is_valid and handle.num_tokens == 5
  with refused(m, errors.SwappedOut, "'a'"):
    use(m, handle)


# allocate


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    (dict(num_layers=3), errors.ShapeMismatch, "num_layers must be 2, got 3"),
    (dict(num_kv_heads=0), errors.ShapeMismatch, "num_kv_heads must be 2, got 0"),
    (dict(head_dim=4), errors.ShapeMismatch, "head_dim must be 2, got 4"),
    (dict(dtype="float16"), errors.ShapeMismatch, "dtype must be float32, got float16"),
    (dict(max_length=25), errors.TooLong, "'a' needs 25 tokens, but may hold 24"),
    (dict(initial_tokens=25), errors.TooLong, "'a' needs 25 tokens, but may hold 24"),
    (dict(initial_tokens=2**40), errors.TooLong, f"'a' needs {2**40} tokens"),
    (dict(initial_tokens=5, max_length=4), errors.TooLong, "'a' needs 5 tokens, but may hold 4"),
    (dict(tokens=[0] * 25), errors.TooLong, "'a' needs 25 tokens, but may hold 24"),
  ],
)
def test_a_request_that_does_not_fit_the_pool_is_refused(fields, error, message):
  m = manager()
  with refused(m, error, message):
    m.allocate(Request("a", **fields))
  assert not m.can_allocate(Request("a", **fields))


def test_a_request_that_fits_the_pool_is_not_refused():
  m = manager()
  m.allocate(
    Request("a", 24, num_layers=2, num_kv_heads=2, head_dim=2, dtype=np.float32, max_length=24)
  )


@pytest.mark.parametrize(
  "fields",
  [
    dict(initial_tokens=-1),
    dict(initial_tokens=True),
    dict(initial_tokens=1.5),
    dict(initial_tokens="3"),
    dict(max_length=-1),
    dict(max_length=1.5),
    dict(initial_tokens=2, tokens=[1] * 25),
    dict(tokens=[-1]),
    dict(tokens=[2**31]),
    dict(tokens=[2**40]),
    dict(tokens=[1.5]),
    dict(tokens=[[1, 2]]),
    dict(tokens=["a"]),
  ],
  ids=str,
)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefixes", "no prefixes"])
def test_a_request_that_makes_no_sense_leaves_no_sequence_behind(fields, prefix_cache):
  m = manager(dict(prefix_cache=prefix_cache))
  with refused(m, (ValueError, TypeError, errors.CacheError)):
    m.allocate(Request("a", **fields))
  assert m.list_handles() == []
  assert m.allocate(Request("a", 3)).row == 0


def test_an_empty_prompt_is_a_sequence_without_tokens():
  m = manager()
  for name, tokens in (("a", []), ("b", ()), ("c", np.zeros(0, np.int32))):
    handle = m.allocate(Request(name, tokens=tokens))
    assert (handle.num_tokens, handle.num_cached, handle.pages) == (0, 0, [])
  assert m.stats().free_pages == 8


def test_an_empty_prompt_fits_a_full_pool():
  m = manager()
  m.allocate_many([Request("a", 24), Request("b", 8)])
  assert m.can_allocate(Request("c", tokens=[])) and m.can_allocate(Request("c", 0))
  assert m.allocate(Request("c", 0)).pages == []


def test_a_live_id_is_refused_and_a_dead_one_is_not():
  m = manager()
  m.allocate(Request("a", 5))
  with refused(m, errors.DuplicateRequest, "'a'"):
    m.allocate(Request("a", 1))
  assert not m.can_allocate(Request("a", 1))
  m.deallocate("a")
  assert m.allocate(Request("a", 1)).num_tokens == 1


def test_a_swapped_id_is_live():
  m = manager()
  m.swap_out(m.allocate(Request("a", 5)))
  with refused(m, errors.DuplicateRequest, "'a'"):
    m.allocate(Request("a", 1))


def test_the_fourth_sequence_of_three_rows_is_refused():
  m = manager()
  m.allocate_many([Request(name) for name in "abc"])
  assert not m.can_allocate(Request("d"))
  with refused(m, errors.OutOfRows, "1 rows are needed, but 0 are free"):
    m.allocate(Request("d"))
  assert m.stats().refusals == 1


def test_at_critical_pressure_allocate_collects_up_to_the_high_watermark():
  m = manager(dict(low_watermark=0.6, high_watermark=0.5))
  store(m, [*range(12)])  # 3 pages
  m.allocate_many([Request("b", 16), Request("c", 4)])
  assert m.check_pressure() is Level.CRITICAL
  m.allocate(Request("d"))
  assert m.stats().free_pages == 3 and m.stats().evicted_pages == 3


def test_initial_tokens_may_be_fewer_or_more_than_the_prompt():
  m = manager()
  store(m, FIVE, last_logits="L")
  a = m.allocate(Request("a", 2, tokens=FIVE))
  assert (a.num_tokens, a.num_cached, a.last_logits) == (2, 2, None)
  b = m.allocate(Request("b", 9, tokens=FIVE))
  assert (b.num_tokens, b.num_cached, b.last_logits) == (9, 5, "L")
  k, _ = m.read_kv(b, 0, 4, 5)
  np.testing.assert_array_equal(
    k, [*replay.values([fingerprints(FIVE)[4]], 0, (2, 2)), *[[[0] * 2] * 2] * 4]
  )


# extend


@pytest.mark.parametrize(("count", "pages"), [(0, 1), (1, 1), (2, 2), (np.int64(6), 3), (21, 6)])
def test_extend_takes_the_pages_of_the_new_tokens(count, pages):
  m = manager()
  handle = m.allocate(Request("a", 3))
  m.extend(handle, count)
  assert handle.num_tokens == 3 + count and handle.pages == [*range(pages)]


@pytest.mark.parametrize("count", [-1, True, 1.5, None, "1", np.float32(1)])
def test_extend_by_what_is_no_number_of_tokens_is_refused(count):
  m = manager()
  handle = m.allocate(Request("a", 3))
  with refused(m, ValueError, f"num_tokens.*{count}"):
    m.extend(handle, count)


@pytest.mark.parametrize("count", [22, 2**31, 2**40])
def test_extend_beyond_the_row_is_refused(count):
  m = manager()
  handle = m.allocate(Request("a", 3))
  with refused(m, errors.TooLong, f"'a' needs {3 + count} tokens, but may hold 24"):
    m.extend(handle, count)


def test_extend_copies_a_shared_partly_filled_tail_first():
  m = manager()
  parent = begin(m, FIVE)
  child = parent.clone("b")
  m.extend(child, 1)
  assert parent.pages == [0, 1] and child.pages == [0, 2] and m.stats().copies == 1
  fill(m, child, [*FIVE, 9], 5)
  check_bytes(m, child, [*FIVE, 9])
  check_bytes(m, parent, FIVE)


def test_extend_of_all_sharers_copies_for_all_but_the_last():
  m = manager()
  parent = begin(m, FIVE)
  handles = [parent, parent.clone("b"), parent.clone("c")]
  m.extend_many(dict.fromkeys(handles, 1))
  assert [handle.pages for handle in handles] == [[0, 2], [0, 3], [0, 1]]
  assert m.stats().copies == 2 and m.stats().free_pages == 4


def test_growth_by_three_with_one_free_keeps_exactly_the_old_mappings():
  m = manager()
  handle = begin(m, [*range(8)])
  m.allocate(Request("b", 20))
  with refused(m, errors.OutOfPages, "3 pages are needed, but 1 are free"):
    m.extend(handle, 12)
  check_bytes(m, handle, [*range(8)])
  assert m.stats().refusals == 1


def test_extend_needs_a_page_for_the_copy_too():
  m = manager()
  parent = begin(m, FIVE)
  child = parent.clone("b")
  m.allocate(Request("c", 24))
  with refused(m, errors.OutOfPages, "1 pages are needed, but 0 are free"):
    m.extend(child, 1)
  m.deallocate("a")
  m.extend(child, 1)
  assert child.pages == [0, 1]


# write_kv and read_kv


def test_six_tokens_over_two_pages_read_back_and_the_other_layer_is_zero():
  m = manager()
  m.allocate(Request("x", 1))
  handle = m.allocate(Request("a", 6))
  k = np.arange(24, dtype=np.float32).reshape(6, 2, 2) + 1
  m.write_kv(handle, 0, 0, k, -k)
  got_k, got_v = m.read_kv(handle, 0, 0, 6)
  np.testing.assert_array_equal(got_k, k)
  np.testing.assert_array_equal(got_v, -k)
  assert not np.any(m.read_kv(handle, 1, 0, 6))


def test_one_token_may_come_without_the_batch_axis():
  m = manager()
  handle = m.allocate(Request("a", 5))
  m.write_kv(handle, 1, 4, ones(1)[0], 2 * ones(1)[0])
  k, v = m.read_kv(handle, np.int64(1), np.int64(3), np.int64(2))
  assert k[:, 0, 0].tolist() == [0, 1] and v[:, 1, 1].tolist() == [0, 2]


def test_read_gathers_pages_that_are_not_neighbours_in_token_order():
  m = manager()
  handle = begin(m, [1, 2, 3, 4])
  m.allocate(Request("b", 4))
  tokens = [1, 2, 3, 4, 5, 6]
  m.extend(handle, 2)
  fill(m, handle, tokens, 4)
  assert handle.pages == [0, 2]
  check_bytes(m, handle, tokens)
  check_bytes(m, handle, tokens, start=3)


def test_unwritten_tokens_read_zero():
  m = manager()
  begin(m, [7] * 24, "x"), begin(m, [7] * 8, "y")  # every page
  m.deallocate_many(["x", "y"])
  handle = m.allocate(Request("a", 5))
  assert not np.any(m.read_kv(handle, 0, 0, 5))


@pytest.mark.parametrize(
  ("start", "count", "token"), [(5, 1, 5), (4, 2, 5), (-1, 1, -1), (-1, 2, -1), (24, 1, 24)]
)
def test_a_token_that_is_not_held_is_named_with_its_page(start, count, token):
  m = manager()
  handle = begin(m, FIVE)
  message = rf"'a' holds no token {token} \(logical page {token // 4}\)"
  with refused(m, errors.UnmappedToken, message):
    m.read_kv(handle, 0, start, count)
  with refused(m, errors.UnmappedToken, message):
    m.write_kv(handle, 0, start, ones(count), ones(count))
  check_bytes(m, handle, FIVE)


@pytest.mark.parametrize("count", [0, -1])
def test_a_read_of_no_tokens_is_refused(count):
  m = manager()
  handle = begin(m, FIVE)
  with refused(m, errors.UnmappedToken):
    m.read_kv(handle, 0, 0, count)


@pytest.mark.parametrize("layer", [-1, 2, np.int64(2), 0.5, None, "0"])
def test_a_layer_that_is_none_is_refused(layer):
  m = manager()
  handle = begin(m, FIVE)
  with refused(m, (ValueError, TypeError)):
    m.read_kv(handle, layer, 0, 1)
  with refused(m, (ValueError, TypeError)):
    m.write_kv(handle, layer, 0, ones(1), ones(1))


@pytest.mark.parametrize("position", [0.5, None, "0"])
def test_a_position_that_is_no_integer_is_refused(position):
  m = manager()
  handle = begin(m, FIVE)
  handle.clone("b")
  with refused(m, (ValueError, TypeError)):
    m.read_kv(handle, 0, position, 1)
  with refused(m, (ValueError, TypeError)):
    m.write_kv(handle, 0, position, ones(1), ones(1))


@pytest.mark.parametrize(
  ("k", "v"),
  [
    (np.ones((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)),
    (np.ones((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32)),
    (ones(1), np.ones((1, 2, 3), np.float32)),
    (ones(2), ones(1)),
    (ones(1), ones(2)),
    (ones(0), ones(0)),
    (np.ones(2, np.float32), np.ones(2, np.float32)),
    (ones(1)[None], ones(1)[None]),
    (1.0, 1.0),
  ],
)
def test_keys_and_values_of_another_shape_are_refused(k, v):
  m = manager()
  handle = begin(m, FIVE)
  with refused(m, errors.ShapeMismatch, r"\('B', 2, 2\)"):
    m.write_kv(handle, 0, 0, k, v)
  check_bytes(m, handle, FIVE)


@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_keys_of_a_dtype_that_is_no_float_are_refused(dtype):
  m = manager()
  handle = begin(m, FIVE)
  with refused(m, (errors.ShapeMismatch, ValueError)):
    m.write_kv(handle, 0, 0, ones(1).astype(dtype), ones(1).astype(dtype))
  check_bytes(m, handle, FIVE)


def test_a_write_into_a_shared_page_copies_it_first():
  m = manager()
  parent = begin(m, FIVE)
  child = parent.clone("b")
  m.write_kv(child, 0, 4, ones(1), ones(1))
  assert parent.pages == [0, 1] and child.pages == [0, 2] and m.stats().copies == 1
  check_bytes(m, parent, FIVE)
  assert m.read_kv(child, 0, 4, 1)[0].tolist() == ones(1).tolist()
  assert m.read_kv(child, 0, 0, 4)[0].tolist() == m.read_kv(parent, 0, 0, 4)[0].tolist()


def test_a_write_that_finds_no_page_for_its_copy_changes_nothing():
  m = manager()
  parent = begin(m, FIVE)
  child = parent.clone("b")
  m.allocate(Request("c", 24))
  with refused(m, errors.OutOfPages, "1 pages are needed, but 0 are free"):
    m.write_kv(child, 0, 4, ones(1), ones(1))
  check_bytes(m, child, FIVE)


# Sharing


@pytest.mark.parametrize(
  ("count", "pages"), [(0, []), (1, [0]), (4, [0]), (5, [0, 1]), (6, [0, 1])]
)
def test_share_prefix_puts_the_first_tokens_on_the_sources_pages(count, pages):
  m = manager()
  source, target = begin(m, SIX), m.allocate(Request("b"))
  m.share_prefix(source, target, np.int64(count))
  assert target.num_tokens == count and target.pages == pages and m.stats().free_pages == 6
  m.deallocate("a")
  check_bytes(m, target, SIX[:count])
  m.extend(target, 3)
  fill(m, target, [*SIX[:count], 9, 9, 9], count)
  check_bytes(m, target, [*SIX[:count], 9, 9, 9])


@pytest.mark.parametrize("count", [7, -1, 24])
def test_more_than_the_source_holds_cannot_be_shared(count):
  m = manager()
  source, target = begin(m, SIX), m.allocate(Request("b"))
  with refused(m, errors.UnmappedToken, f"'a' holds no token {count}"):
    m.share_prefix(source, target, count)


@pytest.mark.parametrize("count", [1.5, None, "1"])
def test_a_share_of_what_is_no_number_of_tokens_is_refused(count):
  m = manager()
  source, target = begin(m, SIX), m.allocate(Request("b"))
  with refused(m, (ValueError, TypeError)):
    m.share_prefix(source, target, count)


def test_a_target_with_tokens_of_its_own_is_refused():
  m = manager()
  source, target = begin(m, SIX), begin(m, [9, 9], "b")
  for each in (target, source):
    with refused(m, errors.NotEmpty, f"'{each.request_id}' holds {each.num_tokens} tokens"):
      m.share_prefix(source, each, 1)


def test_a_target_gets_no_more_than_its_request_allowed():
  m = manager()
  source, target = begin(m, SIX), m.allocate(Request("b", max_length=4))
  with refused(m, errors.TooLong, "'b' needs 5 tokens, but may hold 4"):
    m.share_prefix(source, target, 5)


def test_an_empty_sequence_shares_nothing_with_itself():
  m = manager()
  handle = m.allocate(Request("a"))
  m.share_prefix(handle, handle, 0)
  assert handle.num_tokens == 0 and m.audit().clean


def test_cow_copy_copies_bytes_remaps_and_releases():
  m = manager()
  parent = begin(m, SIX)
  child = parent.clone("b")
  assert m.cow_copy(child, 1) == [0, 2]
  assert m.cow_copy(child) == [3, 2] and not child.is_shared and not parent.is_shared
  assert m.stats().copies == 2 and m.stats().free_pages == 4
  check_bytes(m, child, SIX)
  check_bytes(m, parent, SIX)
  assert m.cow_copy(child) == [3, 2] and m.stats().copies == 2


def test_cow_copy_is_all_or_nothing():
  m = manager()
  child = begin(m, SIX).clone("b")
  m.allocate(Request("c", 20))
  with refused(m, errors.OutOfPages, "2 pages are needed, but 1 are free"):
    m.cow_copy(child)
  assert m.cow_copy(child, 1) == [0, 7]


@pytest.mark.parametrize("first_page", [-1, 2, 0.5, None])
def test_cow_copy_from_a_page_that_is_none_is_refused(first_page):
  m = manager()
  child = begin(m, SIX).clone("b")
  with refused(m, (errors.UnmappedToken, ValueError, TypeError)):
    m.cow_copy(child, first_page)


# Swap


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 24])
def test_swap_moves_the_bytes_out_and_back(count):
  m = manager()
  tokens = [*range(count)]
  handle, pages = begin(m, tokens), -(-count // 4)
  m.swap_out(handle)
  stats = m.stats()
  assert (stats.free_pages, stats.free_host_pages, stats.swapped) == (8, 16 - pages, 1)
  begin(m, [9] * 24, "b"), begin(m, [9] * 8, "c")  # somebody else writes everywhere
  m.deallocate_many(["b", "c"])
  m.swap_in(handle)
  check_bytes(m, handle, tokens)
  stats = m.stats()
  assert (stats.free_pages, stats.free_host_pages, stats.swapped) == (8 - pages, 16, 0)
  assert (stats.pages_swapped_out, stats.pages_swapped_in) == (pages, pages)
  assert stats.peak_host_pages == pages and m.audit().clean


def test_a_sequence_that_came_back_can_go_on():
  m = manager()
  handle = begin(m, FIVE)
  m.swap_out(handle)
  m.swap_in(handle)
  m.extend(handle, 4)
  fill(m, handle, [*FIVE, 9, 9, 9, 9], 5)
  check_bytes(m, handle, [*FIVE, 9, 9, 9, 9])


def test_a_page_shared_by_swapped_sequences_moves_once():
  m = manager()
  parent = begin(m, SIX)
  child = parent.clone("b")
  m.swap_out(parent)
  assert m.stats().free_pages == 6 and m.stats().pages_swapped_out == 0
  m.swap_out(child)
  assert m.stats().free_pages == 8 and m.stats().pages_swapped_out == 2
  m.swap_in_many([child, parent])
  assert m.stats().pages_swapped_in == 2 and child.pages == parent.pages
  check_bytes(m, child, SIX)
  check_bytes(m, parent, SIX)


def test_one_of_two_swapped_sharers_comes_back_alone():
  m = manager()
  parent = begin(m, SIX)
  child = parent.clone("b")
  m.swap_out_many([parent, child])
  m.swap_in(parent)
  assert m.stats().free_host_pages == 16 and m.stats().free_pages == 6
  m.deallocate("a")
  m.swap_in(child)
  check_bytes(m, child, SIX)
  assert m.audit().clean


def test_swap_out_into_a_full_host_pool_changes_nothing():
  m = manager(dict(num_host_pages=3))
  m.swap_out(begin(m, FIVE))
  handle = begin(m, SIX, "b")
  with refused(m, errors.OutOfHostPages, "2 host pages are needed, but 1 are free"):
    m.swap_out(handle)
  check_bytes(m, handle, SIX)
  m.deallocate("a")
  m.swap_out(handle)
  assert m.stats().free_host_pages == 1 and m.stats().refusals == 1


def test_swap_out_many_is_all_or_nothing():
  m = manager(dict(num_host_pages=3))
  handles = [begin(m, FIVE), begin(m, SIX, "b")]
  with refused(m, errors.OutOfHostPages, "4 host pages are needed, but 3 are free"):
    m.swap_out_many(handles)
  assert not any(each.is_swapped for each in handles)


def test_swap_in_without_pages_changes_nothing():
  m = manager()
  handle = begin(m, SIX)
  m.swap_out(handle)
  m.allocate_many([Request("b", 24), Request("c", 4)])
  with refused(m, errors.OutOfPages, "2 pages are needed, but 1 are free"):
    m.swap_in(handle)
  m.deallocate("c")
  m.swap_in(handle)
  check_bytes(m, handle, SIX)


def test_swap_in_without_a_row_changes_nothing():
  m = manager()
  handle = begin(m, SIX)
  m.swap_out(handle)
  m.allocate_many([Request(name) for name in "bcd"])
  with refused(m, errors.OutOfRows, "1 rows are needed, but 0 are free"):
    m.swap_in(handle)


def test_swap_in_many_is_all_or_nothing():
  m = manager()
  handles = [begin(m, SIX), begin(m, FIVE, "b")]
  m.swap_out_many(handles)
  m.allocate(Request("c", 20))
  with refused(m, errors.OutOfPages, "4 pages are needed, but 3 are free"):
    m.swap_in_many(handles)
  assert all(each.is_swapped for each in handles)


def test_swap_out_twice_and_swap_in_of_what_runs_are_refused():
  m = manager()
  handle = begin(m, FIVE)
  with refused(m, errors.NotSwappedOut, "'a'"):
    m.swap_in(handle)
  with refused(m, ValueError, "distinct"):
    m.swap_out_many([handle, m.get_handle("a")])
  m.swap_out(handle)
  with refused(m, ValueError, "distinct"):
    m.swap_in_many([handle, m.get_handle("a")])
  with refused(m, errors.SwappedOut, "'a'"):
    m.swap_out(handle)


def test_deallocating_a_swapped_sequence_frees_its_host_pages():
  m = manager()
  parent = begin(m, SIX)
  child = parent.clone("b")
  m.swap_out_many([parent, child])
  m.deallocate("a")
  assert m.stats().free_host_pages == 14
  m.deallocate("b")
  assert m.stats().free_host_pages == 16 and m.stats().free_pages == 8 and m.audit().clean


def test_swap_keeps_what_a_window_left():
  m = manager()
  tokens = [*range(12)]
  handle = begin(m, tokens)
  m.slide(handle, 9)
  m.swap_out(handle)
  assert m.stats().free_host_pages == 15 and handle.stats().utilization == 3 / 4
  m.swap_in(handle)
  check_bytes(m, handle, tokens, start=9)
  with refused(m, errors.UnmappedToken, "no token 8"):
    m.read_kv(handle, 0, 8, 1)


# deallocate, trim, slide


def test_deallocate_drops_this_sequences_holds_only():
  m = manager()
  parent = begin(m, SIX)
  child = parent.clone("b")
  m.deallocate("a")
  assert m.stats().free_pages == 6
  check_bytes(m, child, SIX)
  m.deallocate("b")
  assert m.stats().free_pages == 8


@pytest.mark.parametrize("name", ["nobody", None, 0, "", ("a",)])
def test_an_unknown_id_is_an_error(name):
  m = manager()
  m.allocate(Request("a", 5))
  for call in (m.deallocate, m.get_handle, lambda name: m.deallocate_many(["a", name])):
    with refused(m, errors.UnknownRequest):
      call(name)


def test_deallocate_many_is_all_or_nothing():
  m = manager()
  m.allocate_many([Request("a", 5), Request("b", 5)])
  with refused(m, ValueError, "distinct"):
    m.deallocate_many(["a", "b", "a"])
  m.deallocate_many(["b", "a"])
  assert m.stats().free_pages == 8 and m.stats().deallocations == 2


def test_batches_of_nothing_change_nothing():
  m = manager()
  m.allocate(Request("a", 5))
  before = state_of(m)
  assert m.allocate_many([]) == []
  m.extend_many({}), m.deallocate_many([]), m.swap_out_many([]), m.swap_in_many([])
  assert state_of(m) == before and m.audit().clean


@pytest.mark.parametrize(
  ("requests", "error", "message"),
  [
    ([Request("a", 1), Request("a", 1)], errors.DuplicateRequest, "'a'"),
    ([Request("a", 1), Request("x", 1)], errors.DuplicateRequest, "'x'"),
    ([Request("a", 1), Request("b", 25)], errors.TooLong, "25"),
    ([Request("a", 24), Request("b", 5)], errors.OutOfPages, "8 pages are needed, but 7 are free"),
    ([Request(i) for i in range(3)], errors.OutOfRows, "3 rows are needed, but 2 are free"),
    ([Request("a", tokens=FIVE), Request("b", tokens=[-1])], ValueError, "tokens"),
  ],
)
def test_allocate_many_is_all_or_nothing(requests, error, message):
  m = manager()
  m.allocate(Request("x", 1))
  with refused(m, error, message):
    m.allocate_many(requests)


@pytest.mark.parametrize(
  ("count", "error"), [(20, errors.OutOfPages), (24, errors.TooLong), (-1, ValueError)]
)
def test_extend_many_is_all_or_nothing(count, error):
  m = manager()
  a, b, _ = m.allocate_many([Request("a", 3), Request("b", 4), Request("c", 4)])
  with refused(m, error):
    m.extend_many({a: 9, b: count})
  assert (a.num_tokens, b.num_tokens) == (3, 4)


def test_a_sequence_has_one_handle():
  m = manager()
  handle = m.allocate(Request("a", 3))
  assert m.get_handle("a") is handle and m.list_handles() == [handle]


@pytest.mark.parametrize(
  ("keep", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (10, 3)]
)
def test_trim_releases_whole_pages_behind_what_is_kept(keep, pages):
  m = manager()
  tokens = [*range(10)]
  handle = begin(m, tokens)
  m.trim(handle, np.int64(keep))
  assert handle.pages == [0, 1, 2][:pages] and m.stats().free_pages == 8 - pages
  check_bytes(m, handle, tokens[:keep])


@pytest.mark.parametrize(("start", "pages"), [(0, 3), (3, 3), (4, 2), (7, 2), (8, 1), (10, 1)])
def test_slide_releases_whole_pages_before_the_window(start, pages):
  m = manager()
  tokens = [*range(10)]
  handle = begin(m, tokens)
  m.slide(handle, np.int64(start))
  assert handle.pages == [0, 1, 2][3 - pages :] and m.stats().free_pages == 8 - pages
  check_bytes(m, handle, tokens, start=start)


@pytest.mark.parametrize("at", [11, -1, 24, 2**40])
def test_trim_and_slide_beyond_what_is_held_are_refused(at):
  m = manager()
  handle = m.allocate(Request("a", 10))
  for cut in (m.trim, m.slide):
    with refused(m, errors.UnmappedToken, f"'a' holds no token {at}"):
      cut(handle, at)


@pytest.mark.parametrize("at", [1.5, None, "1"])
@pytest.mark.parametrize("canary", [False, True])
def test_trim_and_slide_to_what_is_no_number_of_tokens_are_refused(at, canary):
  m = manager(dict(canary=canary))
  handle = begin(m, SIX)
  for cut in (m.trim, m.slide):
    with refused(m, (ValueError, TypeError)):
      cut(handle, at)
  check_bytes(m, handle, SIX)


def test_trim_does_not_reach_behind_the_window_except_to_nothing():
  m = manager()
  handle = m.allocate(Request("a", 10))
  m.slide(handle, 6)
  with refused(m, errors.UnmappedToken, "no token 5"):
    m.trim(handle, 5)
  with refused(m, errors.UnmappedToken, r"no token 4 \(logical page 1\)"):
    m.read_kv(handle, 0, 4, 4)
  with refused(m, errors.UnmappedToken, "logical page 0"):
    handle.page_at(0)
  m.trim(handle, 0)
  assert m.stats().free_pages == 8 and handle.num_tokens == 0


# can_allocate


def test_pool_of_which_four_pages_fit_and_a_second_request_is_refused_with_one_free():
  m = manager()
  m.allocate(Request("rest", 12))  # a pool of five
  m.allocate(Request("a", 16))
  assert m.stats().free_pages == 1 and not m.can_allocate(Request("b", 16))
  with refused(m, errors.OutOfPages, "4 pages are needed, but 1 are free"):
    m.allocate(Request("b", 16))
  m.deallocate("a")
  assert m.stats().free_pages == 5 and m.can_allocate(Request("b", 16))
  assert len(m.allocate(Request("b", 16)).pages) == 4


def test_evictable_prefix_pages_count_as_available():
  m = manager()
  store(m, [*range(24)])
  assert m.stats().free_pages == 2 and m.stats().reclaimable_pages == 6 and m.available_pages == 8
  assert m.can_allocate(Request("b", 24))
  handle = m.allocate(Request("b", 24))
  assert len(handle.pages) == 6 and m.stats().evicted_pages == 4
  assert m.find_prefix([*range(24)]).length == 8


@pytest.mark.parametrize("watermark", [0.1, 0.25], ids=["collects nothing", "collects two"])
@pytest.mark.parametrize("num_used", [0, 1, 2, 5])
@pytest.mark.parametrize("logits", [None, "L"])
def test_can_allocate_says_what_allocate_then_does(num_used, logits, watermark):
  for stored in (0, 3, 8, 13, 24):
    for asked in (1, 4, 8, 9, 13, 24):
      m = manager(dict(high_watermark=watermark))
      if stored:
        store(m, [*range(stored)], last_logits=logits)
      try:
        m.allocate(Request("used", 4 * num_used))
      except errors.OutOfPages:
        continue
      request = Request("b", tokens=[*range(asked)])
      fits = m.can_allocate(request)
      try:
        m.allocate(request)
        assert fits, (stored, asked)
      except errors.OutOfPages:
        assert not fits, (stored, asked)


def test_a_page_that_a_pinned_prefix_ends_on_is_not_available():
  m = manager()
  store(m, FIVE, pinned=True)
  store(m, SIX)  # its second page serves both
  m.allocate(Request("b", 24))
  assert m.stats().free_pages == 0 and m.gc(8).num_pages == 0
  assert m.find_prefix(SIX).length == 6  # what frees nothing is not evicted


def test_can_allocate_does_not_count_a_page_that_a_pinned_prefix_ends_on():
  m = manager()
  store(m, FIVE, pinned=True)
  store(m, SIX)
  m.allocate(Request("b", 24))
  assert m.free_pages == 0 and not m.can_allocate(Request("c", 1))
  with refused(m, errors.OutOfPages, "1 pages are needed, but 0 are free"):
    m.allocate(Request("c", 1))


def test_can_allocate_leaves_no_trace():
  m = manager()
  store(m, FIVE)
  store(m, [9], "b")
  before = state_of(m), m.prefix_stats()
  assert m.can_allocate(Request("c", tokens=FIVE))
  assert (state_of(m), m.prefix_stats()) == before
  m.evict_prefixes(1)
  assert m.find_prefix([9]).length == 1  # the first was not touched


def test_full_pool_refuses_then_frees_one_then_succeeds():
  m = manager()
  m.allocate_many([Request("a", 16), Request("b", 16)])
  with refused(m, errors.OutOfPages, "1 pages are needed, but 0 are free"):
    m.allocate(Request("c", 1))
  m.deallocate("a")
  assert m.allocate(Request("c", 16)).pages == [0, 1, 2, 3]


def test_ten_cycles_of_use_leave_nothing():
  m = manager()
  for cycle in range(10):
    handle = begin(m, [*range(cycle)])
    m.extend(handle, 3)
    handle.clone("b")
    m.deallocate_many(["a", "b"])
  stats = m.stats()
  assert stats.free_pages == 8 and stats.pages_taken == stats.pages_released
  assert m.list_handles() == [] and m.audit().clean


# Pressure


@pytest.mark.parametrize(
  ("used", "level"),
  [(0, Level.LOW), (4, Level.LOW), (5, Level.MEDIUM), (6, Level.HIGH), (7, Level.HIGH),
   (8, Level.CRITICAL)],
)  # fmt: skip
def test_every_level_is_reached(used, level):
  m = manager(dict(low_watermark=0.5, high_watermark=0.3))
  m.allocate_many([Request("a", 4 * min(used, 6)), Request("b", 4 * max(used - 6, 0))])
  assert m.check_pressure() is level


def test_levels_are_entered_and_left_one_after_another():
  m, changes = manager(dict(low_watermark=0.5, high_watermark=0.3)), []
  m.on_pressure(changes.append)
  handle = m.allocate(Request("a", 16))
  for _ in range(2):
    m.extend(handle, 4)
  m.allocate(Request("b", 8))
  m.trim(handle, 12)
  m.deallocate("b")
  low, medium, high, critical = Level
  assert changes == [
    (low, medium, 3), (medium, high, 2), (high, critical, 0), (critical, medium, 3), (medium, low, 5)
  ]  # fmt: skip


@functools.partial(jax.jit, donate_argnums=0)
def grow(cache, num_tokens):
  """A program of the user's own."""
  cache, info = paged_jax.extend(cache, num_tokens)
  return cache, paged_jax.Log(((num_tokens[None],),), ("extend",)), info.ok


def run_growth(m, a):
  m.run(grow, np.array([0, 1, 0], np.int32))
  m.settle()


RELEASES = {
  "deallocate": lambda m, a: m.deallocate("a"),
  "deallocate_many": lambda m, a: m.deallocate_many(["a"]),
  "trim": lambda m, a: m.trim(a, 4),
  "slide": lambda m, a: m.slide(a, 4),
  "swap_out": lambda m, a: m.swap_out(a),
}
EVICTIONS = {
  "gc": lambda m: m.gc(1),
  "evict_prefixes": lambda m: m.evict_prefixes(1),
  "clear_prefixes": lambda m: m.clear_prefixes(),
  "store_prefix": lambda m: m.store_prefix(m.get_handle("rest"), [7] * 4),
  "allocate": lambda m: m.allocate(Request("c")),
}
TAKES = {
  "allocate": lambda m, a: m.allocate(Request("c", 1)),
  "extend": lambda m, a: m.extend(a, 1),
  "cow_copy": lambda m, a: m.cow_copy(a.clone("b"), 1),
  "write_kv": lambda m, a: m.write_kv(a.clone("b"), 0, 7, ones(1), ones(1)),
  "run": run_growth,
}


def watched(m):
  """Changes of level, each noted by a callback that finds the lock free."""
  changes = []

  def callback(change):
    other = threading.Thread(target=lambda: changes.append((*change, m.stats().free_pages)))
    other.start()
    other.join(10)
    assert not other.is_alive()

  m.on_pressure(callback)
  return changes


@pytest.mark.parametrize("path", RELEASES)
def test_every_path_that_releases_pages_calls_back_outside_the_lock(path):
  m = manager(NARROW)
  m.allocate(Request("rest", 24))
  a = begin(m, [*range(8)])
  changes = watched(m)
  RELEASES[path](m, a)
  free = m.stats().free_pages
  assert free > 0 and changes == [(Level.CRITICAL, Level.HIGH, free, free)]


@pytest.mark.parametrize("path", EVICTIONS)
def test_every_path_that_evicts_pages_calls_back_outside_the_lock(path):
  m = manager(NARROW | dict(max_prefixes=1))
  store(m, [*range(8)])
  m.allocate(Request("rest", 24))
  changes = watched(m)
  EVICTIONS[path](m)
  free = m.stats().free_pages
  assert free > 0 and changes == [(Level.CRITICAL, Level.HIGH, free, free)]


@pytest.mark.parametrize("path", TAKES)
def test_every_path_that_takes_pages_calls_back_outside_the_lock(path):
  m = manager(NARROW)
  m.allocate(Request("rest", 20))
  a = begin(m, [*range(8)])
  changes = watched(m)
  TAKES[path](m, a)
  assert changes == [(Level.HIGH, Level.CRITICAL, 0, 0)]


def test_swap_in_calls_back():
  m = manager(NARROW)
  a = begin(m, FIVE)
  m.swap_out(a)
  m.allocate(Request("rest", 24))
  changes = watched(m)
  m.swap_in(a)
  assert changes == [(Level.HIGH, Level.CRITICAL, 0, 0)]


def test_a_callback_that_unsubscribed_is_not_called():
  m, first, second = manager(NARROW), [], []
  end = m.on_pressure(first.append)
  m.on_pressure(second.append)
  m.allocate(Request("a", 4))
  end()
  end()
  m.deallocate("a")
  assert len(first) == 1 and len(second) == 2


def test_the_same_callback_twice_is_two_subscriptions():
  m, seen = manager(NARROW), []
  note = seen.append
  end = m.on_pressure(note)
  m.on_pressure(note)
  end()
  m.allocate(Request("a", 4))
  assert len(seen) == 1


def test_a_callback_that_fails_is_logged_and_the_others_are_called(caplog):
  m, seen = manager(NARROW), []
  m.on_pressure(lambda change: 1 / 0)
  m.on_pressure(seen.append)
  assert m.allocate(Request("a", 4)).num_tokens == 4
  assert len(seen) == 1 and "ZeroDivisionError" in caplog.text


def test_a_refused_call_that_collected_calls_back_too():
  m = manager(NARROW)
  store(m, [*range(8)])
  m.allocate(Request("rest", 24))
  changes = watched(m)
  with pytest.raises(errors.OutOfPages):
    m.allocate(Request("b", 24))
  assert changes == [(Level.CRITICAL, Level.HIGH, 2, 2)]


# gc


def test_gc_returns_true_counts():
  m = manager()
  store(m, FIVE)
  store(m, [9], "b")
  begin(m, [7] * 4, "c")
  found = m.gc(8)
  assert found[:3] == (3, 3 * PAGE_BYTES, 2) and found.seconds >= 0
  assert m.stats().free_pages == 7 and m.prefix_stats().entries == 0
  assert m.gc(8)[:3] == (0, 0, 0)


def test_gc_stops_at_its_target_and_the_low_watermark_is_the_default():
  m = manager()
  store(m, [*range(24)])
  m.allocate(Request("b", 8))
  assert m.stats().free_pages == 0
  assert m.gc(1).num_pages == 1 and m.stats().free_pages == 1
  assert m.gc(np.int64(1))[:3] == (0, 0, 0) and m.gc(0)[:3] == (0, 0, 0)
  assert m.gc()[:3] == (2, 2 * PAGE_BYTES, 0)  # ceil(0.3 * 8) are free now
  assert m.find_prefix([*range(24)]).length == 12


def test_gc_leaves_what_somebody_uses():
  m = manager()
  handle = begin(m, SIX)
  m.store_prefix(handle)
  assert m.gc(8)[:3] == (0, 0, 0) and m.find_prefix(SIX).length == 6
  m.deallocate("a")
  assert m.gc(8)[:3] == (2, 2 * PAGE_BYTES, 1)


# Prefixes


@pytest.mark.parametrize(
  ("query", "length"),
  [([], 0), ([1], 1), ([1, 2, 3, 4], 4), (FIVE, 5), (SIX, 6), ([*SIX, 7], 6), ([2, 3], 0),
   ([1, 2, 9, 4, 5, 6], 2), ([1, 2, 3, 4, 9], 4), (np.array(FIVE), 5), (tuple(FIVE), 5)],
)  # fmt: skip
def test_find_prefix_is_the_longest_one_token_by_token(query, length):
  m = manager()
  store(m, SIX, last_logits="L")
  match = m.find_prefix(query)
  assert match.length == length and len(match.held) == -(-length // 4)
  assert match.last_logits == ("L" if list(query) == SIX else None)


@pytest.mark.parametrize("cached", range(10))
def test_a_hit_ends_anywhere_and_reads_the_former_owners_bytes(cached):
  m = manager()
  store(m, [*range(9)])
  tokens = [*range(cached), 99, 98]
  handle = m.allocate(Request("b", tokens=tokens))
  assert handle.num_cached == cached and handle.num_tokens == cached + 2
  fill(m, handle, tokens, cached)
  check_bytes(m, handle, tokens)
  check_bytes(m, m.allocate(Request("c", 8, tokens=[*range(9)])), [*range(8)])


def test_a_hit_survives_the_owners_release_and_what_the_owner_wrote_on():
  m = manager()
  owner = begin(m, SIX)
  m.store_prefix(owner, FIVE)
  m.extend(owner, 3)
  fill(m, owner, [*FIVE, 9, 9, 9, 9], 5)
  m.deallocate("a")
  handle = m.allocate(Request("b", tokens=SIX))
  assert handle.num_cached == 5
  fill(m, handle, SIX, 5)
  check_bytes(m, handle, SIX)


def test_the_same_prompt_twice_is_one_prefill():
  m = manager()
  logits = np.arange(3.0)
  store(m, FIVE, last_logits=logits)
  for name in "bc":
    handle = m.allocate(Request(name, tokens=FIVE))
    assert handle.num_cached == 5 and handle.last_logits is logits
    check_bytes(m, handle, FIVE)
  assert m.stats().copies == 0 and m.stats().free_pages == 6


def test_without_logits_the_last_token_is_left_to_compute():
  m = manager()
  store(m, FIVE)
  handle = m.allocate(Request("b", tokens=FIVE))
  assert handle.num_cached == 4 and handle.last_logits is None


def test_different_suffixes_of_a_shared_prefix_do_not_cross():
  m = manager()
  store(m, FIVE)
  prompts = {"b": [*FIVE, 6, 7], "c": [*FIVE, 8, 9], "d": [1, 2, 3, 7]}
  handles = {name: begin(m, tokens, name) for name, tokens in prompts.items()}
  for name, handle in handles.items():
    check_bytes(m, handle, prompts[name])
    m.store_prefix(handle, last_logits=name)
  for name, tokens in prompts.items():
    m.deallocate(name)
    assert m.find_prefix(tokens).last_logits == name
    handle = m.allocate(Request("x" + name, tokens=tokens))
    assert handle.num_cached == len(tokens)
    check_bytes(m, handle, tokens)


def test_too_short_prompts_are_not_stored():
  m = manager(dict(min_prefix_length=5))
  assert not store(m, FIVE[:4]) and store(m, FIVE)
  assert m.prefix_stats().entries == 1


def test_what_is_too_short_to_be_stored_takes_nobodys_place():
  m = manager(dict(min_prefix_length=5, max_prefixes=1))
  assert store(m, FIVE) and not store(m, [7, 8, 9])
  assert m.prefix_stats().entries == 1 and m.find_prefix(FIVE).length == 5


@pytest.mark.parametrize("options", [dict(max_prefixes=0), dict(prefix_cache=False)])
def test_a_prefix_cache_that_is_off_stores_nothing(options):
  m = manager(options)
  assert not store(m, FIVE)
  assert m.allocate(Request("b", tokens=FIVE)).num_cached == 0
  assert m.stats().free_pages == 6 and m.prefix_stats().entries == 0


def test_no_tokens_are_not_stored():
  m = manager()
  handle = m.allocate(Request("a", 5))
  assert not m.store_prefix(handle, []) and not m.store_prefix(handle)
  assert m.prefix_stats().entries == 0 and m.audit().clean


def test_storing_again_replaces():
  m = manager()
  store(m, FIVE, last_logits="old")
  store(m, FIVE, last_logits="new")
  stats = m.prefix_stats()
  assert (stats.entries, stats.cached_tokens) == (1, 5) and m.stats().free_pages == 6
  assert m.find_prefix(FIVE).last_logits == "new"
  store(m, FIVE)  # none are no news: they follow from the tokens
  assert m.find_prefix(FIVE).last_logits == "new"


@pytest.mark.parametrize("tokens", [[*FIVE, 6], [0] * 24])
def test_more_than_the_sequence_holds_cannot_be_stored(tokens):
  m = manager()
  handle = begin(m, FIVE)
  with refused(m, errors.UnmappedToken, f"'a' holds no token {len(tokens)}"):
    m.store_prefix(handle, tokens)
  m.slide(handle, 1)
  with refused(m, errors.UnmappedToken, "'a'"):
    m.store_prefix(handle, FIVE)


@pytest.mark.parametrize("tokens", [[-1], [2**31], [1.5], [[1]], ["a"], np.array([0.5]), 3, None])
def test_a_query_of_what_is_no_token_is_refused(tokens):
  m = manager()
  store(m, FIVE)
  with refused(m, ValueError, "tokens"):
    m.find_prefix(tokens)


@pytest.mark.parametrize("fields", [dict(namespace=["x"]), dict(ttl="soon"), dict(tokens=["a"])])
def test_a_store_that_makes_no_sense_changes_nothing(fields):
  m = manager()
  namespace = fields.pop("namespace", None)
  try:
    handle = m.allocate(Request("a", 5, namespace=namespace))
  except (TypeError, ValueError):
    return  # refused at once
  with refused(m, (TypeError, ValueError)):
    m.store_prefix(handle, **(dict(tokens=FIVE) | fields))
  assert m.prefix_stats().entries == 0


def test_one_hit_and_one_miss_are_a_half():
  m = manager()
  assert m.prefix_stats().hit_rate == 0
  store(m, FIVE)
  m.clear_prefixes(reset_counters=True)
  store(m, FIVE)
  assert m.find_prefix([*FIVE, 9]).length == 5 and m.find_prefix([8, 9]).length == 0
  stats = m.prefix_stats()
  assert (stats.queries, stats.hits, stats.misses) == (3, 1, 2)
  assert (stats.tokens_queried, stats.tokens_hit) == (5 + 6 + 2, 5)
  assert (stats.entries, stats.cached_tokens, stats.hit_rate) == (1, 5, 1 / 3)


def test_cached_tokens_count_what_prefixes_share_once():
  m = manager()
  store(m, [*FIVE, 6])
  store(m, [*FIVE, 7], "b")
  assert m.prefix_stats().cached_tokens == 7 and m.prefix_stats().entries == 2


@pytest.mark.parametrize("reset", [False, True])
def test_clear_forgets_and_keeps_or_resets_the_counters(reset):
  m = manager()
  store(m, FIVE, pinned=True)
  store(m, [9], "b")
  m.evict_prefixes(1)
  m.find_prefix(FIVE)
  m.clear_prefixes(reset_counters=reset)
  stats = m.prefix_stats()
  assert (stats.entries, stats.cached_tokens) == (0, 0) and m.stats().free_pages == 8
  assert (stats.queries, stats.hits, stats.misses) == ((0, 0, 0) if reset else (3, 1, 2))
  assert stats.evictions == (0 if reset else 1)
  assert m.find_prefix(FIVE).length == 0 and m.audit().clean


def test_clear_leaves_sequences_what_they_use():
  m = manager()
  store(m, FIVE)
  handle = m.allocate(Request("b", tokens=[*FIVE, 6]))
  m.clear_prefixes()
  fill(m, handle, [*FIVE, 6], 5)
  check_bytes(m, handle, [*FIVE, 6])
  assert m.stats().free_pages == 6 and not handle.is_shared


def test_capacity_two_touch_the_first_and_a_third_evicts_the_second():
  m = manager(dict(max_prefixes=2))
  first, second, third = [1, 1], [2, 2], [3, 3]
  store(m, first), store(m, second)
  m.find_prefix(first)
  store(m, third)
  assert [m.find_prefix(x).length for x in (first, second, third)] == [2, 0, 2]
  stats = m.prefix_stats()
  assert (stats.entries, stats.evictions) == (2, 1) and m.stats().free_pages == 6


@pytest.mark.parametrize(
  ("policy", "order"),
  [(eviction.LRU, [2, 3, 1]), (eviction.FIFO, [1, 2, 3]), (eviction.CLOCK, [2, 3, 1]),
   (eviction.Policy("longest", lambda use: -use.num_tokens), [3, 2, 1])],
  ids=lambda x: getattr(x, "name", ""),
)  # fmt: skip
def test_the_policy_says_what_goes_first(policy, order):
  gone = []
  for count in (1, 2, 3):  # afresh, since looking is a use
    m = manager(dict(eviction=policy))
    for n in (1, 2, 3):
      store(m, [n] * n)
    m.find_prefix([1])
    assert m.evict_prefixes(count) == count
    gone += [n for n in (1, 2, 3) if n not in gone and m.find_prefix([n] * n).length == 0]
  assert gone == order


@pytest.mark.parametrize("count", [-1, 0, 1, 2, 3, np.int64(9)])
def test_evict_prefixes_returns_how_many(count):
  m = manager()
  store(m, [1]), store(m, [2])
  begin(m, [7], "b")
  m.store_prefix(m.get_handle("b"))
  gone = max(0, min(count, 2))
  assert m.evict_prefixes(count) == gone
  assert m.prefix_stats().entries == 3 - gone and m.stats().free_pages == 5 + gone


@pytest.mark.parametrize("count", [1.5, None])
def test_evict_prefixes_by_what_is_no_count_is_refused(count):
  m = manager()
  store(m, [1])
  with refused(m, (ValueError, TypeError)):
    m.evict_prefixes(count)


def test_a_pinned_prefix_stays_until_it_is_unpinned():
  m = manager()
  store(m, [*range(8)], pinned=True)
  assert m.evict_prefixes(1) == 0 and m.gc(8).num_pages == 0 and m.free_pages == 6
  m.allocate(Request("b", 24))
  with refused(m, errors.OutOfPages, "1 pages are needed, but 0 are free"):
    m.allocate(Request("c", 1))
  assert m.pin([*range(8)], pinned=False) and not m.pin([*range(7)])
  assert m.allocate(Request("c", 1)).num_tokens == 1


@pytest.mark.parametrize(("now", "length"), [(0.0, 5), (9.9, 5), (10.0, 0), (11.0, 0)])
def test_a_prefix_lives_as_long_as_it_was_given(now, length):
  clock = Clock()
  m = manager(dict(clock=clock))
  store(m, FIVE, ttl=10.0)
  clock.now = now
  assert m.find_prefix(FIVE).length == length


@pytest.mark.parametrize("other", [None, "", "b", ("a",), b"a", 0])
def test_a_namespace_is_part_of_the_key(other):
  m = manager()
  store(m, FIVE, namespace="a", last_logits="L")
  assert m.find_prefix(FIVE, "a") == (5, "L", m.find_prefix(FIVE, "a").held)
  assert m.find_prefix(FIVE, other).length == 0
  assert m.allocate(Request("b", tokens=FIVE, namespace=other)).num_cached == 0
  assert m.allocate(Request("c", tokens=FIVE, namespace="a")).num_cached == 5


def test_generated_tokens_can_be_stored_too():
  m = manager()
  handle = begin(m, FIVE)
  m.extend(handle, 2)
  m.record(np.array([[6] * 3, [7] * 3], np.int32), np.array([2, 0, 0]))
  fill(m, handle, [*FIVE, 6, 7], 5)
  m.store_prefix(handle)
  m.deallocate("a")
  assert m.find_prefix([*FIVE, 6, 7, 8]).length == 7
  check_bytes(m, m.allocate(Request("b", 7, tokens=[*FIVE, 6, 7, 8])), [*FIVE, 6, 7])


# Looking


def test_handles_are_listed_oldest_first():
  m = manager()
  m.allocate_many([Request("a", 1), Request("b", 2)])
  m.deallocate("a")
  m.allocate(Request("a", 3))
  m.swap_out(m.get_handle("b"))
  assert [(each.request_id, each.num_tokens) for each in m.list_handles()] == [("b", 2), ("a", 3)]


def test_get_handle_is_the_same_sequence():
  m = manager()
  handle = begin(m, FIVE)
  again = m.get_handle("a")
  assert again.cache_id == handle.cache_id
  m.extend(again, 1)
  assert handle.num_tokens == 6


def test_stats_count_sequences_and_utilization_never_exceeds_one():
  m = manager()
  m.swap_out(m.allocate(Request("a", 24)))
  m.allocate_many([Request("b", 24), Request("c", 8)])
  stats = m.stats()
  assert (stats.running, stats.swapped, stats.utilization) == (2, 1, 1.0)
  assert (stats.page_bytes, stats.num_host_pages) == (PAGE_BYTES, 16)


def test_the_audit_notices_a_hold_that_was_lost():
  m = manager()
  store(m, FIVE)
  assert m.audit().clean
  m._state.cache, info = paged_jax.jitted.drop(m.cache, jnp.array([0] + [8] * 7, jnp.int32))
  assert info.ok.all() and not m.audit().clean


# Scrub and canary

FREES = {
  "deallocate": (lambda m, a: m.deallocate("a"), [0, 1]),
  "trim": (lambda m, a: m.trim(a, 4), [1]),
  "trim to nothing": (lambda m, a: m.trim(a, 0), [0, 1]),
  "slide": (lambda m, a: m.slide(a, 4), [0]),
  "swap_out": (lambda m, a: m.swap_out(a), [0, 1]),
}


def non_zero_pages(m):
  return [page for page, kv in enumerate(np.asarray(m.cache.pages.kv)) if kv.any()]


@pytest.mark.parametrize("path", FREES)
@pytest.mark.parametrize("scrub", [False, True])
def test_scrub_clears_every_page_that_becomes_free(path, scrub):
  m = manager(dict(scrub=scrub))
  handle = begin(m, SIX)
  assert non_zero_pages(m) == [0, 1]
  act, freed = FREES[path]
  act(m, handle)
  assert non_zero_pages(m) == [page for page in (0, 1) if not (scrub and page in freed)]


@pytest.mark.parametrize("evict", [lambda m: m.gc(8), lambda m: m.evict_prefixes(1),
                                   lambda m: m.clear_prefixes()])  # fmt: skip
def test_scrub_clears_evicted_pages(evict):
  m = manager(dict(scrub=True))
  store(m, SIX)
  assert non_zero_pages(m) == [0, 1]
  evict(m)
  assert non_zero_pages(m) == []


def test_scrub_leaves_what_another_still_holds():
  m = manager(dict(scrub=True))
  child = begin(m, SIX).clone("b")
  m.deallocate("a")
  check_bytes(m, child, SIX)


def overwrite(m, page, values):
  """Somebody else's bytes in a page, behind the manager's back: of each array, or one for all."""
  if not isinstance(values, list):
    values = [values] * len(jax.tree.leaves(m.cache.pages))
  values = jax.tree.unflatten(jax.tree.structure(m.cache.pages), values)
  pages = jax.tree.map(lambda x, new: x.at[page].set(new), m.cache.pages, values)
  m._state.cache = paged_jax.types.Cache(ledger=m.cache.ledger, pages=pages)


def bytes_of(m, page):
  """What each array has in a page."""
  return [x[page] for x in jax.tree.leaves(m.cache.pages)]


of_8_bits_too = pytest.mark.parametrize("dtype", ["float32", "int8"])


@of_8_bits_too
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_the_canary_finds_a_slot_that_was_overwritten(value, dtype):
  m = manager(dict(canary=True), dtype=dtype)
  handle = begin(m, SIX)
  check_bytes(m, handle, SIX)
  overwrite(m, 1, [1, value] if dtype == "int8" else value)
  m.read_kv(handle, 0, 0, 4)
  with pytest.raises(errors.CanaryMismatch, match="'a': token 4, on page 1, is not what"):
    m.read_kv(handle, 0, 0, 6)


@of_8_bits_too
def test_the_canary_finds_a_page_that_was_swapped_for_another(dtype):
  m = manager(dict(canary=True), dtype=dtype)
  handle, other = begin(m, [1, 2, 3, 4]), begin(m, [1, 2, 3, 4], "b")
  overwrite(m, handle.pages[0], bytes_of(m, other.pages[0]))
  with pytest.raises(errors.CanaryMismatch, match="'a': token 0, on page 0"):
    m.read_kv(handle, 0, 0, 4)
  check_bytes(m, other, [1, 2, 3, 4])


@of_8_bits_too
def test_the_canary_finds_a_page_whose_scales_were_not_moved(dtype):
  m = manager(dict(canary=True), dtype=dtype)
  handle, other = begin(m, [1, 2, 3, 4]), begin(m, [7, 7, 7, 7], "b")
  mine, others = bytes_of(m, handle.pages[0]), bytes_of(m, other.pages[0])
  overwrite(m, handle.pages[0], [others[0], *mine[1:]])
  with pytest.raises(errors.CanaryMismatch, match="'a': token 0, on page 0"):
    m.read_kv(handle, 0, 0, 4)


@of_8_bits_too
def test_canary_marks_move_with_clones_hits_copies_and_swaps(dtype):
  m = manager(dict(canary=True), dtype=dtype)
  store(m, SIX)
  a = begin(m, [*SIX, 7])
  b = a.clone("b")
  m.extend(b, 1)
  fill(m, b, [*SIX, 7, 8], 7)
  m.swap_out(b)
  m.swap_in(b)
  m.trim(a, 5)
  check_bytes(m, a, FIVE)
  check_bytes(m, b, [*SIX, 7, 8])


@pytest.mark.parametrize("head_dim", [2, 12, 25])
@pytest.mark.parametrize("value_dim", [None, 1])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16"])
def test_canary_marks_of_8_bits_differ_and_are_read_back(dtype, head_dim, value_dim):
  sizes = config(dtype=dtype, head_dim=head_dim, value_dim=value_dim)
  numbers = np.array([0, 1, 7, 8, 63, 300])
  marks = [tensors._marks(cache_id, numbers, sizes)[0] for cache_id in (0, 5)]
  for k in marks:
    read = np.rint(replay._read(k.astype(np.float32), np.dtype(dtype)))
    np.testing.assert_array_equal(read, k.astype(np.float32))
  if head_dim > 2:
    assert len({k[:, 0].tobytes() for k in marks[0][:, None]}) == len(numbers)


def test_the_canary_layer_is_not_the_users():
  m = manager(dict(canary=True))
  handle = begin(m, FIVE)
  with refused(m, ValueError, "layer"):
    m.read_kv(handle, 2, 0, 1)


# Switched off


def test_without_copy_on_write_whole_pages_are_shared_and_parts_are_refused():
  m = manager(copy_on_write=False)
  source, target = begin(m, SIX), m.allocate(Request("b"))
  with refused(m, errors.Disabled, "copy-on-write is off"):
    m.share_prefix(source, target, 5)
  with refused(m, errors.Disabled, "copy-on-write is off"):
    source.clone("c")
  m.share_prefix(source, target, 4)
  assert target.pages == [0]
  with refused(m, errors.Disabled, "copy-on-write is off"):
    m.cow_copy(target)
  with refused(m, errors.Disabled, "copy-on-write is off"):
    m.write_kv(target, 0, 0, ones(1), ones(1))
  check_bytes(m, target, SIX[:4])


def test_without_copy_on_write_an_extension_that_needs_a_copy_is_refused():
  m = manager(copy_on_write=False)
  handle = begin(m, FIVE)
  m.store_prefix(handle)
  with refused(m, errors.Disabled, "copy-on-write is off"):
    m.extend(handle, 1)
  m.clear_prefixes()
  m.extend(handle, 1)
  assert handle.num_tokens == 6


@pytest.mark.parametrize(("asked", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_without_copy_on_write_a_hit_ends_at_a_page(asked, cached):
  m = manager(copy_on_write=False)
  store(m, [*range(10)])
  tokens = [*range(asked)]
  handle = begin(m, tokens, "b")
  assert handle.num_cached == cached
  check_bytes(m, handle, tokens)


def test_without_copy_on_write_a_part_of_a_page_swaps_out_and_in():
  m = manager(copy_on_write=False)
  handle = begin(m, FIVE)
  m.swap_out(handle)
  m.swap_in(handle)
  m.extend(handle, 2)
  fill(m, handle, [*FIVE, 6, 7], 5)
  check_bytes(m, handle, [*FIVE, 6, 7])


def test_without_swapping_both_ways_are_refused():
  m = manager(dict(swapping=False, num_host_pages=0))
  handle = begin(m, FIVE)
  for swap in (m.swap_out, m.swap_in):
    with refused(m, errors.Disabled, "swapping is off"):
      swap(handle)


def test_a_host_pool_of_no_pages_refuses_by_number():
  m = manager(dict(num_host_pages=0))
  handle = begin(m, FIVE)
  with refused(m, errors.OutOfHostPages, "2 host pages are needed, but 0 are free"):
    m.swap_out(handle)


def test_the_configuration_is_the_one_that_was_given():
  assert manager().config == config()


def test_gc_wants_a_number_of_pages():
  m = manager()
  for target in (-1, "8", 1.5):
    with pytest.raises(
      ValueError, match=f"target must be an integer of at least 0, got {target!r}"
    ):
      m.gc(target)


def test_a_removed_event_says_what_the_sequence_held():
  m = manager()
  one = m.allocate(Request("one", 6))
  m.swap_out(one)
  m.swap_in(one)
  m.extend(one, 4)
  two = m.allocate(Request("two", 5))
  m.swap_out(two)
  m.deallocate_many(["one", "two"])
  removed = [each[2:] for each in m.events().events if each.kind == "removed"]
  assert removed == [("one", 3, 10), ("two", 2, 5)]
