"""A manager of several groups of caches: joint refusals, ends of prefixes with their tails."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from managed import Clock, Story, begin, check_bytes, fill, grow, manager, refused
from story import config

import paged_jax
from paged_jax import groups
from paged_jax.host import Level, Manager, ManagerConfig, Prefix, Request, errors
from paged_jax.testing import replay


def cache(num_pages=12, **fields):
  return config(num_pages=num_pages, **dict(num_layers=1, max_length=32) | fields)


WINDOW = cache(num_pages=9, window=6)
BOTH = cache(), WINDOW  # pages of 4 tokens
CACHES = {
  "full, window": BOTH,
  "window, full": BOTH[::-1],
  "window": WINDOW,
  "tuple of one": (WINDOW,),
  "page sizes": (
    cache(num_pages=16, page_size=2, window=5), cache(num_pages=9, window=8), cache(page_size=8),
  ),
}  # fmt: skip
TWENTY = list(range(40, 60))


def both(caches=BOTH, **options):
  return manager(options, caches)


def store(m, tokens, name="stored", **fields):
  """A prefix that no sequence uses."""
  done = m.store_prefix(begin(m, tokens, name), **fields)
  m.deallocate(name)
  return done


def num_cached(m, tokens):
  """What a new sequence of these tokens finds; it reads back what a model would have written."""
  handle = begin(m, tokens, "asks")
  check_bytes(m, handle, tokens)
  m.deallocate("asks")
  return handle.num_cached


def nothing_left(m):
  return m.free_pages == tuple(each.num_pages for each in m.config) and m.audit().clean


# Random histories


class Groups(Story):
  """A story with pins and lifetimes, in which freed pages are full of NaN."""

  def __init__(self, rng, m, clock):
    super().__init__(rng, m)
    self.clock, self.poison = clock, jax.jit(replay.poison)

  def step(self):
    super().step()
    self.manager._state.cache = self.poison(self.manager.cache)

  def do_store_for_a_while(self):
    if (name := self.some()) is not None:
      handle, tokens = self.live[name]
      self.manager.store_prefix(handle, tokens, ttl=int(self.rng.integers(3)))

  def do_pin(self):
    if (name := self.some()) is not None:
      tokens = self.live[name][1]
      self.manager.pin(tokens, pinned=bool(self.rng.integers(2)))

  def do_pass_time(self):
    self.clock.now += 1

  def do_unpin_all(self):
    self.manager.clear_prefixes(pinned=False)


OPTIONS = {
  "plain": {},
  "spill": dict(spill=True, num_host_pages=5),
  "few entries, scrub": dict(max_prefixes=2, scrub=True),
}


def run(name, options, seed, num_steps, clock=None):
  clock = clock or Clock()
  m = manager(OPTIONS[options] | dict(clock=clock), CACHES[name])
  story = Groups(np.random.default_rng(seed), m, clock)
  for _ in range(num_steps):
    story.step()
    story.check()
  story.end()
  return story


@pytest.mark.once
@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=4, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(seed=st.integers(0, 2**32), options=st.sampled_from(list(OPTIONS)))
def test_a_history_keeps_every_byte_and_every_count(name, seed, options):
  run(name, options, seed, 40)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CACHES)
def test_many_histories(name):
  for seed in range(60):
    run(name, list(OPTIONS)[seed % 3], seed, 150)


# Ends of prefixes. A window of 6 and pages of 4: the tail at token 20 begins with token 12.


def test_a_prefix_is_found_at_its_end():
  m = both()
  assert store(m, TWENTY)
  assert m.free_pages == (12 - 5, 9 - 2)  # all of it, and tokens 12 to 19
  assert num_cached(m, [*TWENTY, 1]) == 20


def test_a_prompt_that_comes_again_computes_its_last_token_for_the_logits():
  m = both()
  store(m, TWENTY)
  assert num_cached(m, TWENTY) == 19


def test_a_prompt_that_comes_again_takes_stored_logits():
  m = both()
  store(m, TWENTY, last_logits="logits")
  handle = m.allocate(Request("again", tokens=TWENTY))
  assert (handle.num_cached, handle.last_logits) == (20, "logits")
  check_bytes(m, handle, TWENTY)


@pytest.mark.parametrize("shared, cached", [(20, 20), (17, 17), (16, 0), (8, 0)])
def test_nothing_goes_on_from_the_middle_except_near_the_end(shared, cached):
  m = both()
  store(m, TWENTY)
  assert num_cached(m, [*TWENTY[:shared], 1]) == cached  # token 17 sees 12 to 17, and 16 token 11


def test_a_text_shorter_than_its_window_goes_on_from_its_middle():
  m = both()
  store(m, TWENTY[:5])
  assert num_cached(m, [*TWENTY[:3], 1]) == 3


def test_of_two_ends_the_longer_one_that_is_whole_is_used():
  m = both()
  store(m, TWENTY[:12])
  store(m, TWENTY)
  assert num_cached(m, [*TWENTY[:15], 1]) == 12
  assert num_cached(m, [*TWENTY, 1]) == 20


def test_an_evicted_tail_leaves_the_shorter_end():
  m = both()
  store(m, TWENTY)
  store(m, TWENTY[:12])  # later, so that the other one goes first
  assert m.free_pages == (7, 5)
  assert m.gc((0, 6)).num_pages == 1
  assert m.prefix_stats().entries == 2
  assert num_cached(m, [*TWENTY, 1]) == 12


def test_a_prefix_stored_again_has_its_tail_again():
  m = both()
  store(m, TWENTY)
  m.gc((0, 9))
  assert num_cached(m, [*TWENTY, 1]) == 0
  assert store(m, TWENTY)
  assert m.free_pages == (7, 7)
  assert num_cached(m, [*TWENTY, 1]) == 20


def test_a_tail_of_which_the_last_page_is_evicted_grows_back():
  m = both()
  store(m, TWENTY)
  m.gc((0, 8))
  assert m.free_pages == (7, 8)
  assert num_cached(m, [*TWENTY, 1]) == 0
  assert store(m, TWENTY)
  assert m.free_pages == (7, 7)
  assert num_cached(m, [*TWENTY, 1]) == 20


def test_ends_share_the_pages_of_their_tails():
  m = both()
  handle = begin(m, TWENTY[:14])
  assert m.store_prefixes([Prefix(handle, TWENTY[:n]) for n in (14, 13, 12)]) == [True] * 3
  m.deallocate("a")
  assert m.free_pages == (8, 9 - 3)  # tokens 4 to 13
  assert [num_cached(m, [*TWENTY[:n], 1]) for n in (14, 13, 12)] == [14, 13, 12]
  assert m.evict_prefixes(3) == 3 and nothing_left(m)


def test_tails_spill_to_the_host_and_come_back():
  m = both(spill=True, num_host_pages=(8, 3))
  store(m, TWENTY)
  m.gc((12, 9))
  assert m.free_pages == (12, 9)
  assert [each.free_host_pages for each in m.stats()] == [8 - 5, 3 - 2]
  assert num_cached(m, [*TWENTY, 1]) == 20
  assert m.clear_prefixes() == 1 and nothing_left(m)
  assert [each.free_host_pages for each in m.stats()] == [8, 3]


@pytest.mark.parametrize("caches", [cache(), *CACHES.values()], ids=["full", *CACHES])
def test_a_lifetime_that_is_over_leaves_no_page_held(caches):
  clock = Clock()
  m = manager(dict(clock=clock), caches)
  store(m, TWENTY, ttl=5)
  clock.now = 6
  assert num_cached(m, [*TWENTY, 1]) == 0
  assert groups.each(m.free_pages) == tuple(each.num_pages for each in groups.each(m.config))


def test_a_pinned_prefix_keeps_its_tail_until_it_is_unpinned():
  m = both()
  store(m, TWENTY, pinned=True)
  assert m.available_pages == m.free_pages == (7, 7)
  m.gc((12, 9))
  assert (m.evict_prefixes(9), m.clear_prefixes(pinned=False)) == (0, 0)
  assert num_cached(m, [*TWENTY, 1]) == 20
  assert m.pin(TWENTY, pinned=False)
  assert m.available_pages == (12, 9)
  m.gc((12, 9))
  assert nothing_left(m)


@pytest.mark.parametrize("name", CACHES)
def test_no_more_prefixes_are_stored_than_allowed(name):
  m = manager(dict(max_prefixes=2), CACHES[name])
  for first in (0, 10, 20):
    assert store(m, list(range(first, first + 9)))
  assert m.prefix_stats().entries == 2
  assert [num_cached(m, [*range(first, first + 9), 1]) for first in (0, 10, 20)] == [0, 9, 9]
  assert m.evict_prefixes(9) == 2
  assert groups.each(m.free_pages) == tuple(each.num_pages for each in groups.each(m.config))


@pytest.mark.parametrize("name", CACHES)
def test_a_prefix_in_use_stays(name):
  m = manager(dict(max_prefixes=1), CACHES[name])
  handle = begin(m, TWENTY[:8])
  m.store_prefix(handle)
  assert m.evict_prefixes(1) == 0
  assert not store(m, list(range(9)))
  m.deallocate("a")
  assert store(m, list(range(9)))
  assert m.evict_prefixes(1) == 1


@pytest.mark.parametrize("name", CACHES)
def test_a_prefix_that_is_too_short_is_in_no_group(name):
  m = manager(dict(min_prefix_length=8), CACHES[name])
  assert not store(m, TWENTY[:7])
  assert groups.each(m.free_pages) == tuple(each.num_pages for each in groups.each(m.config))


def test_a_prefix_that_a_window_has_passed_is_not_stored():
  m = both()
  handle = begin(m, TWENTY[:10])
  grow(m, handle, TWENTY)
  m.extend(handle, 1)
  assert [m.store_prefix(handle, TWENTY[:n]) for n in (18, 10)] == [True, False]
  m.deallocate("a")
  assert num_cached(m, [*TWENTY[:18], 1]) == 18


def test_with_windows_alone_a_passed_beginning_does_not_matter():
  m = manager(None, WINDOW)
  handle = begin(m, TWENTY[:10])
  grow(m, handle, TWENTY)
  m.extend(handle, 1)
  assert [m.store_prefix(handle, TWENTY[:n]) for n in (20, 10)] == [True, False]
  m.deallocate("a")
  assert num_cached(m, [*TWENTY, 1]) == 20


def test_a_group_without_a_window_that_slid_has_no_prefix():
  m = both()
  handle = begin(m, TWENTY)
  m.slide(handle, 4)
  with refused(m, errors.UnmappedToken):
    m.store_prefix(handle, TWENTY)


def test_what_one_group_gives_up_makes_room_in_the_others():
  m = both((cache(6), cache(6, window=6)))
  store(m, TWENTY)
  assert (m.free_pages, m.available_pages) == ((1, 4), (6, 6))
  assert m.allocate(Request("all", 24)).num_tokens == 24  # 6 pages of each


def test_what_an_extend_frees_counts_as_room():
  m = both()
  m.allocate(Request("b", 12))
  handle = begin(m, [*TWENTY, 1, 2, 3, 4])
  assert m.free_pages == (3, 0)
  grow(m, handle, [*TWENTY, 1, 2, 3, 4, 5])  # four pages go, one comes
  assert m.free_pages == (2, 3)


def test_gc_counts_prefixes_once():
  m = both()
  store(m, TWENTY)
  collected = m.gc((12, 9))
  assert (collected.num_pages, collected.num_entries) == (5 + 2, 1)
  assert collected.num_bytes == 5 * m.config[0].page_bytes + 2 * m.config[1].page_bytes


def test_evicted_prefixes_leave_every_group():
  m = both((cache(), cache(page_size=8), cache(page_size=2, num_pages=16, window=5)))
  assert store(m, TWENTY) and store(m, TWENTY[:9])
  m.gc((12, 0, 0))  # the first group gives up both, and the third one their tails
  assert m.free_pages == (12, 9, 16)
  assert m.evict_prefixes(9) == 0
  assert nothing_left(m)


def test_pin_finds_no_prefix_that_is_gone_from_one_group():
  m = both((cache(), cache(page_size=8), cache(page_size=2, num_pages=16, window=5)))
  store(m, TWENTY)
  m.gc((9, 0, 0))
  assert not m.pin(TWENTY)
  assert m.available_pages == (12, 12, 16)


def test_clearing_keeps_pinned_prefixes_and_their_tails():
  m = both()
  store(m, TWENTY, pinned=True)
  store(m, list(range(9)))
  assert m.clear_prefixes(pinned=False) == 1
  assert m.free_pages == (7, 7)
  assert num_cached(m, [*TWENTY, 1]) == 20
  assert m.clear_prefixes() == 1 and nothing_left(m)


def test_spilled_prefixes_of_every_group_give_way_to_a_swap():
  m = both(spill=True, num_host_pages=(5, 5))
  store(m, TWENTY)
  m.gc((12, 9))
  handle = begin(m, list(range(20)))
  assert [each.free_host_pages for each in m.stats()] == [0, 3]
  m.swap_out(handle)  # five pages of each
  assert [each.free_host_pages for each in m.stats()] == [0, 0]
  m.swap_in(handle)
  check_bytes(m, handle, list(range(20)))


# Rows


def passed(m):
  """A sequence of 24 tokens whose window has passed all before token 17."""
  handle = begin(m, TWENTY)
  grow(m, handle, [*TWENTY, 1, 2])
  grow(m, handle, [*TWENTY, 1, 2, 3, 4])
  assert handle.pages == ([0, 1, 2, 3, 4, 5], [4, 5])
  return handle


def test_a_row_that_a_window_has_passed_is_swapped():
  m = both(num_host_pages=(6, 2))
  handle = passed(m)
  m.swap_out(handle)
  assert m.free_pages == (12, 9)
  assert [each.free_host_pages for each in m.stats()] == [0, 0]
  assert handle.stats()[:3] == (24, 0, 6 + 2)
  m.swap_in(handle)
  assert handle.stats()[:3] == (24, 6 + 2, 0)
  check_bytes(m, handle, [*TWENTY, 1, 2, 3, 4])


def test_what_a_window_has_passed_does_not_come_back():
  m = both()
  handle = passed(m)
  assert [handle.begins(n) for n in (24, 22, 21, 0)] == [True, True, False, True]
  for verb in (m.trim, lambda *args: m.clone(handle, "b", num_tokens=args[1])):
    with refused(m, errors.UnmappedToken, "holds no token 21"):
      verb(handle, 21)
  other = m.allocate(Request("c"))
  with refused(m, errors.UnmappedToken):
    m.share_prefix(handle, other, 21)
  m.share_prefix(handle, other, 22)
  check_bytes(m, other, [*TWENTY, 1, 2])


def test_a_slide_keeps_what_the_next_token_sees():
  m = both()
  handle = begin(m, TWENTY)
  with refused(m, errors.UnmappedToken):
    m.slide(handle, 16)  # token 20 sees 15
  m.slide(handle, 15)
  assert [len(pages) for pages in handle.pages] == [2, 2]


def test_running_out_of_pages_names_the_group():
  m = both()
  m.allocate(Request("a", 20))
  with refused(m, errors.OutOfPages, "5 pages are needed, but 4 are free in group 1"):
    m.allocate(Request("b", 20))
  with refused(m, errors.OutOfPages, "in group 0"):
    m.allocate_many([Request("b", 4)], reserve=(7, 0))


def test_running_out_of_host_pages_names_the_group():
  m = both(num_host_pages=(5, 4))
  handle = m.allocate(Request("a", 20))
  with refused(m, errors.OutOfHostPages, "5 host pages are needed, but 4 are free in group 1"):
    m.swap_out(handle)


def test_pressure_is_that_of_the_fullest_pool():
  m, seen = both(), []
  m.on_pressure(seen.append)
  assert m.check_pressure() is Level.LOW
  m.allocate(Request("a", 32))  # 8 of 12 pages, 8 of 9
  assert m.check_pressure() is Level.MEDIUM
  m.allocate(Request("b", 1))
  assert [(change.entered, change.num_free) for change in seen] == [
    (Level.MEDIUM, 1), (Level.CRITICAL, 0),
  ]  # fmt: skip


def test_a_copy_on_write_is_one_of_every_group():
  m = both()
  handle = begin(m, TWENTY[:18])
  m.clone(handle, "b")
  m.extend(handle, 1)
  assert m.num_free == m.free_pages == (12 - 6, 9 - 6)
  assert [each.copies for each in m.stats()] == [1, 1]
  assert m.num_copies == 2


@pytest.mark.parametrize("group, page_size", [(0, 2), (1, 4), (2, 8)])
def test_bytes_are_read_and_written_by_group(group, page_size):
  m = both(CACHES["page sizes"])
  handle = begin(m, TWENTY)
  assert handle.page_at(2, group) == 2
  with pytest.raises(errors.UnmappedToken, match=f"no token {16 * page_size}"):
    handle.page_at(16, group)
  k = np.full((2, 2, 2), 7.0, np.float32)
  m.write_kv(handle, 0, 18, k, -k, group=group)
  for each in range(3):
    read = m.read_kv(handle, 0, 18, 2, group=each)[0]
    assert np.array_equal(read, k) == (each == group)
  for bad in (3, -1):
    with pytest.raises(ValueError, match=f"group must be in .0, 3., got {bad}"):
      m.read_kv(handle, 0, 18, 2, group=bad)
    with pytest.raises(ValueError, match="group"):
      handle.page_at(0, bad)


# Options


def test_scrub_clears_what_a_window_has_passed():
  m = both(scrub=True)
  passed(m)
  kv = np.asarray(m.cache[1].pages.kv)
  assert [bool(kv[page].any()) for page in range(6)] == [False] * 4 + [True] * 2


KEYS = config(num_layers=1, num_kv_heads=1, head_dim=8, value_dim=4, num_pages=9, window=6)


def test_the_canary_watches_every_group():
  m = both((config(num_layers=1, num_pages=12), KEYS), canary=True)
  handle = m.allocate(Request("a", 9))
  m.write_kv(handle, 0, 0, np.ones((9, 2, 2)), np.ones((9, 2, 2)))
  m.write_kv(handle, 0, 0, np.ones((9, 1, 8)), group=1)
  m.swap_out(handle)
  m.swap_in(handle)
  m.extend(handle, 1)  # the second group now begins with token 4
  k, v = m.read_kv(handle, 0, 4, 5, group=1)
  assert (k.shape, v.shape) == ((5, 1, 8), (5, 1, 4)) and (v == 1).all()
  with pytest.raises(errors.UnmappedToken):
    m.read_kv(handle, 0, 3, 5, group=1)
  caches = list(m.cache)
  for group, page in enumerate((handle.page_at(2, 0), handle.page_at(2, 1))):
    cache = caches[group]
    kv = cache.pages.kv.at[page].set(0)
    pages = dataclasses.replace(cache.pages, kv=kv)
    caches[group] = dataclasses.replace(cache, pages=pages)
    m._state.cache = tuple(caches)
    with pytest.raises(errors.CanaryMismatch, match="token 8"):
      m.read_kv(handle, 0, 6, 3, group=group)


@pytest.mark.parametrize("value", [None, np.ones((1, 1, 4))])
def test_values_are_given_unless_they_are_part_of_keys(value):
  m = both((config(num_layers=1, num_pages=12), KEYS))
  handle = m.allocate(Request("a", 9))
  k, group = (np.ones((1, 2, 2)), 0) if value is None else (np.ones((1, 1, 8)), 1)
  with pytest.raises(errors.ShapeMismatch, match="v must be"):
    m.write_kv(handle, 0, 0, k, value, group=group)


def test_without_copy_on_write_whole_pages_are_shared():
  m = both((cache(copy_on_write=False), cache(num_pages=9, window=6, copy_on_write=False)))
  assert store(m, TWENTY)
  assert num_cached(m, [*TWENTY, 1]) == 20
  assert num_cached(m, TWENTY) == 16
  assert store(m, [*range(10)])
  assert num_cached(m, [*range(10), 1]) == 8
  handle = begin(m, [*range(10), 2, 3])
  m.swap_out(handle)
  m.swap_in(handle)
  check_bytes(m, handle, [*range(10), 2, 3])
  m.clear_prefixes()
  m.deallocate("a")
  assert nothing_left(m)


def test_without_copy_on_write_page_sizes_must_be_equal():
  with pytest.raises(ValueError, match="without copy_on_write caches must have one page_size"):
    Manager((cache(copy_on_write=False), cache(copy_on_write=False, page_size=8)))


def test_caches_that_do_not_go_together_are_refused():
  with pytest.raises(ValueError, match=r"num_rows, got \[3, 4\]"):
    Manager((cache(), cache(num_rows=4)))
  with pytest.raises(ValueError, match=r"num_host_pages must be one number or 2, got \(1, 2, 3\)"):
    Manager(BOTH, ManagerConfig(num_host_pages=(1, 2, 3)))
  for target in ((1, 2, 3), -1, (1, True)):
    with pytest.raises(ValueError, match="target"):
      both().gc(target)


def test_warm_up_compiles_all_that_sequences_need(compiled):
  m = both(spill=True)
  m.warm_up()
  fill(m, m.allocate(Request("a", 1)), [1], 0)
  m.deallocate("a")
  compiled.clear()
  store(m, TWENTY)
  m.gc((12, 9))
  handle = m.allocate(Request("again", tokens=[*TWENTY, 1]))
  m.extend(handle, 3)
  m.trim(handle, 23)
  m.swap_out(handle)
  m.swap_in(handle)
  m.clone(handle, "b")
  assert compiled == []


# Programs


def test_a_program_reports_what_it_did_to_every_group():
  m = both()
  handle = begin(m, TWENTY)

  @jax.jit
  def grow(cache, counts):
    grown = []
    for count in counts:
      cache, info = paged_jax.extend(cache, count)
      grown.append(info.ok)
    return cache, paged_jax.Log(((counts,),), ("extend",)), grown

  counts = np.array([[2, 0, 0], [1, 0, 0], [4, 0, 0]], np.int32)
  ticket = m.run(grow, counts)
  [other] = m.allocate_many([Request("b", 5)], reserve=(2, 2), wait=False)
  m.deallocate_many(["b"], wait=False)
  assert not other.is_valid
  assert m.settle(ticket) == (12 - 7, 9 - 3)
  assert handle.pages[1][-2:] == [5, 6] and np.all(ticket.result)
  assert handle.num_tokens == 27
  assert m.audit().clean
