"""The host ledger alone: marks, reports, counts, refusals and cost. `test_backends` has its verbs."""

import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from story import config

import paged_jax
from paged_jax import groups
from paged_jax.ledger import HostLedger
from paged_jax.ledger import log as log_lib
from paged_jax.testing import replay, strategies


def run(ledger, history):
  """Asks for each step, and checks that the host hears of each held page that changes."""
  for step in history:
    if step.verb in (*log_lib.VERBS, "restore"):
      with hearing(ledger):
        replay.on_host(ledger, [], step)


@contextlib.contextmanager
def hearing(ledger):
  before = groups.each(ledger.snapshot())
  for book in ledger.groups:
    book.touched.clear()
  yield
  for book, one, other in zip(ledger.groups, before, groups.each(ledger.snapshot())):
    was, now = one.pool, other.pool
    held = (was.holds > 0) | (now.holds > 0)
    changed = (was.holds != now.holds) | (was.refcount != now.refcount)
    assert set((held & changed).nonzero()[0]) <= book.touched <= set(held.nonzero()[0])


def same(ledger, other):
  for one, two in zip(groups.each(ledger.snapshot()), groups.each(other.snapshot()), strict=True):
    replay.same(one, two)
  assert ledger.num_copies == other.num_copies


@settings(
  max_examples=100, derandomize=True, deadline=None, database=None,
  suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.data())
def test_a_rewind_brings_back_what_was_marked_and_a_replay_what_the_program_did(data):
  config = data.draw(strategies.configs() | strategies.several_configs())
  history = data.draw(strategies.histories(config))
  cut = data.draw(st.integers(0, len(history)))
  first, second = history[:cut], history[cut:]
  shape = 3, groups.each(config)[0].num_rows
  counts = st.lists(st.integers(-1, 9), min_size=shape[1] * 3, max_size=shape[1] * 3)
  operands = (np.reshape(data.draw(counts), shape), np.reshape(data.draw(counts), shape))
  log = paged_jax.Log(tuple((x,) for x in operands), ("extend", "trim"))

  ledger, direct = HostLedger(config), HostLedger(config)
  run(ledger, first)
  run(direct, first)
  ledger.mark()
  for _ in range(2):
    run(ledger, second)
    with hearing(ledger):
      ledger.rewind()
    same(ledger, direct)
  ledger.replay(log)
  run(ledger, second)
  for more, kept in zip(*operands):
    direct.extend(more)
    direct.trim(kept)
  run(direct, second)
  same(ledger, direct)


@pytest.mark.parametrize(
  "config",
  [config(window=5), (config(num_pages=18), config(page_size=2, window=3))],
  ids=["window", "groups"],
)
def test_steps_that_are_replayed_at_once_leave_behind_what_each_of_them_would(config):
  ledger, direct = HostLedger(config), HostLedger(config)
  draw = np.random.default_rng(0)
  for _ in range(100):
    counts = draw.integers(0, 3, (3, 3))
    ledger.replay(paged_jax.Log(((counts,),), ("extend",)))
    for each in counts:
      direct.extend(each)
    same(ledger, direct)
    full = ledger.lengths > 17
    ledger.free(full)
    direct.free(full)


def test_a_search_crosses_windows_of_the_bitmap_and_the_end_of_the_pool():
  n = 24 * 8192 + 5
  ledger = HostLedger(config(num_pages=n))
  ledger.take_held(np.array(n), n)
  free = [100, 101, 8199, 10 * 8192, n - 1, 5, 99]  # in the order from page 100 on
  ledger.drop(np.array(sorted(free)))
  ledger.groups[0].cursor = 100
  for count in (1, 4, 2):
    pages, info = ledger.take_held(np.array(count), 4)
    assert pages[:count].tolist() == free[:count] and info.num_free == len(free) - count
    free = free[count:]
  assert ledger.groups[0].cursor == 100 and not ledger.groups[0].bitmap.any()


def test_a_rewind_without_a_mark_is_refused():
  ledger = HostLedger(config())
  with pytest.raises(ValueError, match="rewind needs a mark"):
    ledger.rewind()
  ledger.mark()
  ledger.unmark()
  with pytest.raises(ValueError, match="rewind needs a mark"):
    ledger.rewind()


def test_copies_on_write_are_counted():
  ledger = HostLedger(config())
  ledger.extend(np.array([6, 0, 0]))
  ledger.fork(np.array([0, 0]), np.array([1, 2]))
  ledger.extend(np.array([1, 1, 1]))
  assert ledger.num_copies == 2
  ledger.unshare(np.zeros(3, np.int32))  # the first page, in two of three rows
  assert ledger.num_copies == 4


@pytest.mark.parametrize(
  "verb, operands, message",
  [
    ("extend", (np.zeros(4, np.int32),), r"num_tokens must have shape \[3\], got \[4\]"),
    ("extend", ([0, 0, 0],), "num_tokens must be an array, got list"),
    ("extend", (np.zeros(3),), "num_tokens must have an integer dtype, got float64"),
    ("extend", (np.full(3, 2**31),), "num_tokens must fit in int32, got 2147483648"),
    ("fork", (np.zeros(2, int), np.zeros(1, int)), r"dst must have shape \[2\]"),
    ("reorder", (np.zeros((3, 1), int),), "sources must have shape"),
    ("unshare", (np.zeros(3, bool),), "starts must have an integer dtype"),
    ("trim", (np.zeros(1, int),), "lengths must have shape"),
    ("slide", (np.zeros(1, int),), "starts must have shape"),
    ("free", (np.zeros(3, int),), "rows must have a bool dtype"),
    ("hold", (np.zeros(0, int),), r"pages must have shape \[any\], got \[0\]"),
    ("drop", (np.zeros((2, 2), int),), "pages must have shape"),
    ("adopt", (np.zeros(1, int), np.zeros((2, 6), int), np.zeros(1, int)), "pages must have shape"),
    ("take_held", (np.zeros(1, int), 4), "count must have shape"),
  ],
)
def test_operands_of_the_wrong_kind_are_refused_by_name(verb, operands, message):
  ledger = HostLedger(config())
  with pytest.raises(ValueError, match=message):
    getattr(ledger, verb)(*operands)
  replay.same(ledger.snapshot(), HostLedger(config()).snapshot())


@pytest.mark.parametrize("busy", [100, 2**20 - 40])
def test_no_verb_costs_memory_that_grows_with_the_pool(busy):
  ledger = HostLedger(config(num_pages=2**20, page_size=4, num_rows=8, max_length=256))
  ledger.take_held(np.array(busy), busy)
  ledger.mark()
  some, one = np.zeros(8, np.int32), np.array([1])
  some[:2] = 30
  for verb, operands in (
    ("pages_needed", (some,)), ("extend", (some,)), ("fork", (one, one + 1, some[:1])),
    ("extend", (some // 30,)), ("unshare", (some // 30,)), ("trim", (some // 2,)),
    ("slide", (some // 4,)), ("reorder", (np.arange(8)[::-1].copy(),)),
     ("free", (np.ones(8, bool),)),
    ("hold", (one,)), ("drop", (one,)), ("adopt", (one, one[None], one)),
    ("take_held", (np.array(3), 8)), ("rewind", ()),
  ):  # fmt: skip
    tracemalloc.start()
    getattr(ledger, verb)(*operands)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**16, (verb, peak)  # the bitmap alone takes twice as much
