"""A manager of several groups of caches: joint refusals, ends of prefixes with their tails."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from managed import Clock, Story, begin, check_bytes, grow, manager, refused
from story import config

import paged_jax
from paged_jax import groups
from paged_jax.host import Request, errors
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


def run(name, options, seed, num_steps):
  clock = Clock()
  m = manager(OPTIONS[options] | dict(clock=clock), CACHES[name])
  story = Groups(np.random.default_rng(seed), m, clock)
  for _ in range(num_steps):
    story.step()
    story.check()
  story.end()
  return story


@pytest.mark.once
@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=6, deadline=None, derandomize=True,
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
  assert (
    m.store_prefixes([paged_jax.host.Prefix(handle, TWENTY[:n]) for n in (14, 13, 12)])
    == [True] * 3
  )
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
