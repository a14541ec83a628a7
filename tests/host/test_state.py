"""The twin: equal to the device's ledger bit for bit, through verbs and programs, never by reading."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from managed import Story, check_bytes, fill, manager

import paged_jax
from paged_jax import jitted
from paged_jax.host import Prefix, Request, errors
from paged_jax.host.state import BYTE_SIZES, batches, bucket


@functools.partial(jax.jit, donate_argnums=0, static_argnames="num_steps")
def decode(cache, active, *, num_steps):
  """Steps of a serving loop: rows grow by a token each; the log says what was asked for."""

  def step(cache, _):
    asked = active.astype(jnp.int32)
    cache, info = paged_jax.extend(cache, asked)
    return cache, (asked, info.ok)

  cache, (asked, ok) = jax.lax.scan(step, cache, None, length=num_steps)
  return cache, paged_jax.Log(((asked,),), ("extend",)), ok


@functools.partial(jax.jit, donate_argnums=0)
def verify(cache, drafts, kept):
  """Speculation: rows grow by drafts, and all but the kept ones are trimmed."""
  cache, _ = paged_jax.extend(cache, drafts)
  lengths = cache.lengths - drafts + jnp.minimum(drafts, kept)
  cache, _ = paged_jax.trim(cache, lengths)
  return cache, paged_jax.Log(((drafts[None],), (lengths[None],)), ("extend", "trim")), None


@functools.partial(jax.jit, donate_argnums=0)
def beam(cache, sources, more):
  cache, _ = paged_jax.reorder(cache, sources)
  cache, _ = paged_jax.extend(cache, more)
  return cache, paged_jax.Log(((sources[None],), (more[None],)), ("reorder", "extend")), None


def test_after_programs_the_twin_is_the_devices_ledger_bit_for_bit():
  rng = np.random.default_rng(0)
  m = manager(num_pages=40, num_rows=5)
  handles = [m.allocate(Request(i, int(n))) for i, n in enumerate((3, 4, 5, 0, 1))]
  for turn in range(12):
    active = rng.random(5) < 0.7
    m.run(decode, active, num_steps=3)
    drafts = rng.integers(0, 4, 5).astype(np.int32)
    m.run(verify, drafts, rng.integers(0, 4, 5).astype(np.int32))
    if turn % 3 == 2:
      m.run(beam, np.array([0, 0, 2, 1, 4], np.int32), np.full(5, 1, np.int32))
    assert m.audit().clean
    m.store_prefix(handles[0], list(range(handles[0].num_tokens)))
    if handles[turn % 5].num_tokens > 12:
      m.trim(handles[turn % 5], 2)
    assert m.audit().clean
  assert m.stats().copies > 0 or m.stats().pages_taken > 10


def test_programs_queue_up_and_settle_in_order():
  m = manager(num_pages=40, num_rows=5)
  handle = m.allocate(Request("a", 3))
  for _ in range(4):
    m.run(decode, np.array([True] + [False] * 4), num_steps=2)
  m.settle()
  assert handle.num_tokens == 11 and len(handle.pages) == 3
  assert m.audit().clean


@functools.partial(jax.jit, donate_argnums=0)
def dawdle(cache, num_turns):
  turns = jax.lax.fori_loop(0, num_turns, lambda i, x: x @ x / 128, jnp.ones((128, 128)))
  log = paged_jax.Log(((jnp.zeros_like(cache.lengths)[None],),), ("extend",))
  return cache, log, turns


def test_a_report_is_taken_over_while_the_next_program_runs():
  m = manager(num_pages=40, num_rows=5)
  m.allocate(Request("a", 3))
  for num_turns in (1, 20_000):  # the first time compiles, the second one takes a page
    m.settle()
    free = m.num_free
    first = m.run(decode, np.array([True] + [False] * 4), num_steps=1)
    slow = m.run(dawdle, num_turns).result
  m.settle(first)
  assert (m.num_free, m.num_mapped) == (free - 1, 2)
  m.settle(first)  # it is so already
  assert not slow.is_ready()
  with pytest.raises(ValueError, match="ticket must be of this manager's `run`, got Ticket"):
    manager(num_pages=40, num_rows=5).settle(first)


def test_tokens_that_come_with_a_report_are_recorded_and_may_be_stored():
  m = manager(num_pages=40, num_rows=5)
  handle = m.allocate(Request("a", tokens=[7, 8, 9]))
  m.run(decode, np.array([True] + [False] * 4), num_steps=3)
  tokens = np.arange(15, dtype=np.int32).reshape(3, 5)
  m.settle(tokens=tokens, num_tokens=np.array([3, 0, 0, 0, 0]))
  assert m.store_prefix(handle)
  assert m.find_prefix([7, 8, 9, 0, 5, 10, 1]).length == 6
  with pytest.raises(ValueError, match="tokens and num_tokens"):
    m.settle(tokens=tokens)


def test_a_program_that_meets_a_full_pool_is_replayed_with_its_refusals():
  m = manager(num_pages=4, num_rows=5)
  handles = m.allocate_many([Request(i, 3) for i in range(4)])
  ok = m.run(decode, np.ones(5, bool), num_steps=3).result
  m.settle()
  assert m.audit().clean
  assert [handle.num_tokens for handle in handles] == [4, 4, 4, 4]  # full pages, and no more
  assert np.asarray(ok)[0].tolist() == [True, True, True, True, False]


def test_bytes_that_a_program_did_not_touch_stay():
  m = manager(num_pages=40, num_rows=5)
  tokens = [1, 2, 0, 1, 2, 2]
  handle = m.allocate(Request("a", 6))
  fill(m, handle, tokens, 0)
  copy = handle.clone("b")
  m.run(decode, np.array([True, False, False, False, False]), num_steps=5)
  m.trim(handle, 6)
  check_bytes(m, handle, tokens)
  check_bytes(m, copy, tokens)


# No device read: the cache on the device is only a shape, so a read of it raises.


class Abstract(Exception):
  """Raised by whoever wants to look at the device."""


def abstract_verbs():
  """The compiled verbs, on shapes alone."""

  def shapes_only(verb, static):
    return jax.jit(verb, static_argnames=static).eval_shape  # traced once per shape

  names = ("extend", "fork", "unshare", "trim", "slide", "free", "hold", "drop", "adopt", "plan",
           "write", "offload", "restore", "gather", "scrub", "audit")  # fmt: skip
  static = {"plan": ("implementation",), "gather": ("num_tokens",)}
  return types.SimpleNamespace(
    **{name: shapes_only(getattr(paged_jax, name), static.get(name, ())) for name in names}
  )


def unreadable(options=None):
  """A manager whose device results are abstract."""
  m = manager(options, num_pages=9, num_rows=5)
  m._state.verbs = abstract_verbs()
  m._state.cache = jax.eval_shape(lambda: jitted.init(m._state.config))
  return m


class Blind(Story):
  """The same operations, without looking at bytes."""

  def step(self):
    try:
      super().step()
    except TypeError as error:
      raise Abstract from error


@pytest.mark.parametrize("options", [{}, dict(spill=True, num_host_pages=5), dict(scrub=True)])
def test_no_operation_reads_the_device(options, monkeypatch):
  monkeypatch.setattr("managed.check_bytes", lambda *_: None)
  story = Blind(np.random.default_rng(1), unreadable(options))
  for _ in range(250):
    story.step()
  assert story.count > 40 and story.manager.stats().pages_swapped_in > 0


@pytest.mark.parametrize(
  "read",
  [
    lambda m, handle: m.read_kv(handle, 0, 0, 1),
    lambda m, handle: m.audit(),
    lambda m, handle: np.asarray(m.cache.lengths) + 1,
    lambda m, handle: int(m.cache.num_free),
  ],
)
def test_a_deliberate_read_of_the_device_fails_there(read):
  m = unreadable()
  handle = m.allocate(Request("a", 3))
  with pytest.raises((TypeError, IndexError, AttributeError)):
    read(m, handle)


def test_batches_pad_to_few_sizes():
  assert [bucket(n, (8, 64)) for n in (1, 8, 9, 64, 65)] == [8, 8, 64, 64, 64]
  found = list(batches(list(range(10)), 99, (2, 8)))
  assert [(count, ids.tolist()) for count, ids in found] == [
    (8, list(range(8))),
    (2, [8, 9]),
  ]


def test_nothing_compiles_once_every_size_was_seen(compiled):
  m = manager(dict(spill=True), num_pages=9, num_rows=5)
  story = Story(np.random.default_rng(2), m)
  for _ in range(400):
    story.step()
  compiled.clear()
  for _ in range(200):
    story.step()
  assert not compiled


def test_copies_compile_nothing_after_warm_up(compiled):
  m = manager(num_pages=43, num_rows=5)  # a size that no other test has
  m.run(decode, np.zeros(5, bool), num_steps=7)
  m.warm_up()
  assert compiled
  compiled.clear()
  one = m.allocate(Request("one", 6))
  two = one.clone("two")
  m.run(decode, np.array([True, True] + [False] * 3), num_steps=7)  # copies the page they share
  assert (one.num_tokens, two.num_tokens) == (13, 13)
  three = one.clone("three")
  m.extend(three, 1)  # copies one, too
  assert not compiled
  assert m.num_copies == 2
  assert m.audit().clean


def ahead(m, wait, num_turns):
  """Frees a row, stores it, and begins another one behind a program that takes pages, and a slow one."""
  one, two = m.allocate_many(
    [Request("one", tokens=range(9)), Request("two", tokens=range(20, 29))]
  )
  m.run(decode, np.array([False, True] + [False] * 3), num_steps=5)
  slow = m.run(dawdle, num_turns).result
  m.store_prefixes([Prefix(one, range(9))], wait=wait)
  m.deallocate_many(["one"], wait=wait)
  requests = [Request("three", tokens=[*range(9), 40]), Request("four", 12)]
  handles = m.allocate_many(requests, reserve=2, wait=wait)
  return [two, *handles], slow


def test_rows_come_and_go_while_programs_run():
  m, waits = (manager(num_pages=16, num_rows=5) for _ in range(2))
  for each in (m, waits):  # compiles
    ahead(each, True, 1)
    each.deallocate_many(["two", "three", "four"])
    each.clear_prefixes()
  handles, slow = ahead(m, False, 20_000)
  assert m.num_free == 16 - 3 - 3 - 1 - 3  # two, one and its successor's copy, four
  assert not slow.is_ready()
  same, _ = ahead(waits, True, 1)
  assert [each.pages for each in handles] == [each.pages for each in same]
  assert handles[0].num_tokens == 14 and handles[1].num_cached == 9
  assert m.stats() == waits.stats()
  assert m.audit().clean
  assert m.num_free == 5  # two has taken one, too


def test_without_waiting_a_reserve_is_left_or_nothing_is_taken():
  m = manager(num_pages=8, num_rows=5)
  m.allocate(Request("one", 8))
  with pytest.raises(errors.OutOfPages) as caught:
    m.allocate_many([Request("two", 12)], reserve=4, wait=False)
  assert (caught.value.needed, caught.value.free) == (7, 6)
  assert (m.num_free, m.num_free_rows) == (6, 4)
  m.allocate_many([Request("two", 12)], reserve=3, wait=False)
  with pytest.raises(ValueError, match="reserve must be an integer of at least 0, got -1"):
    m.allocate_many([Request("three", 1)], reserve=-1)
  assert m.audit().clean


def test_pages_restored_behind_a_program_are_those_that_the_device_takes():
  m = manager(dict(spill=True), num_pages=8, num_rows=5)
  one = m.allocate(Request("one", tokens=range(8)))
  k, v = np.ones((2, 8, 2, 2), np.float32) * np.arange(8)[:, None, None]
  m.write_kv(one, 0, 0, k, v)
  m.store_prefix(one)
  m.deallocate("one")
  m.gc(8)  # spilled
  m.allocate(Request("two", 4))
  m.run(decode, np.array([True] + [False] * 4), num_steps=4)  # takes a page
  (three,) = m.allocate_many([Request("three", tokens=[*range(8), 9])], reserve=1, wait=False)
  assert three.num_cached == 8
  np.testing.assert_array_equal(m.read_kv(three, 0, 0, 8)[0], k)
  assert m.audit().clean


def test_more_pages_than_a_batch_of_images_come_back_in_order():
  most = BYTE_SIZES[-1]
  m = manager(num_pages=2 * most, num_rows=2, max_length=8 * most, options=dict(num_host_pages=40))
  handle = m.allocate(Request("a", 4 * (most + 3)))
  k = np.broadcast_to(
    np.arange(4 * (most + 3), dtype=np.float32)[:, None, None], (4 * (most + 3), 2, 2)
  )
  m.write_kv(handle, 1, 0, k, -k)
  m.swap_out(handle)
  m.swap_in(handle)
  got_k, got_v = m.read_kv(handle, 1, 0, len(k))
  np.testing.assert_array_equal(got_k, k)
  np.testing.assert_array_equal(got_v, -k)


@functools.partial(jax.jit, donate_argnums=0)
def cut(cache, lengths):
  cache, _ = paged_jax.trim(cache, lengths)
  return cache, paged_jax.Log(((lengths[None],),), ("trim",)), None


@pytest.mark.parametrize("program", ["fills", "empties"])
def test_a_row_that_a_program_fills_or_empties_is_freed_behind_it(program):
  m = manager(num_pages=40, num_rows=5)
  handle = m.allocate(Request("a", 0 if program == "fills" else 3))
  if program == "fills":
    m.run(decode, np.arange(5) == handle.row, num_steps=3)
  else:
    m.run(cut, np.zeros(5, np.int32))
  m.deallocate_many(["a"], wait=False)
  assert m.free_pages == 40 and m.audit().clean
  assert m.allocate(Request("b", 2)).num_tokens == 2
  assert m.audit().clean


def test_a_wrong_log_is_named_again_and_again_and_takes_nothing_with_it():
  m = manager(num_pages=40, num_rows=5)
  m.allocate(Request("a", 6))
  m.run(decode, np.array([True] + [False] * 4), num_steps=3)
  m.run(lambda cache: (cache, paged_jax.Log(((jnp.zeros((1, 5), jnp.int32),),), ("grow",)), None))
  m.deallocate_many(["a"], wait=False)
  for _ in range(2):
    with pytest.raises(ValueError, match="verbs must be of"):
      m.settle()
    assert m.num_free == 40  # as if the programs did nothing


def test_tokens_of_a_ticket_are_recorded_once_and_only_with_its_report():
  m, other = (manager(num_pages=40, num_rows=5) for _ in range(2))
  handle = m.allocate(Request("a", tokens=[7, 8, 9]))
  ticket = m.run(decode, np.array([True] + [False] * 4), num_steps=1)
  told = dict(tokens=np.full((1, 5), 3, np.int32), num_tokens=np.array([1, 0, 0, 0, 0]))
  for wrong in (other.run(decode, np.zeros(5, bool), num_steps=1), np.zeros(3)):
    with pytest.raises(ValueError, match="ticket must be of this manager's"):
      m.settle(wrong, **told)
  m.settle(ticket, **told)
  with pytest.raises(ValueError, match="tokens of this ticket are recorded already"):
    m.settle(ticket, **told)
  assert m.store_prefix(handle) and m.find_prefix([7, 8, 9, 3, 3]).length == 4


def test_marks_are_not_expected_of_a_program_whose_report_a_restore_took_over():
  m = manager(dict(canary=True, spill=True), num_pages=20, num_rows=5)
  one = m.allocate(Request("one", tokens=range(8)))
  m.store_prefix(one)
  m.deallocate("one")
  m.gc(20)  # spilled
  two = m.allocate(Request("two", 4))
  m.write_kv(two, 0, 0, *np.ones((2, 4, 2, 2), np.float32))
  lengths = np.array([3, 0, 0, 0, 0], np.int32)
  m.run(cut, lengths)
  m.run(decode, np.array([True] + [False] * 4), num_steps=1)
  m.allocate_many([Request("three", tokens=range(8))], wait=False)
  m.read_kv(two, 0, 0, 4)


def test_lengths_beyond_a_row_are_named():
  m = manager()
  lengths = np.full(m.config.num_rows, 10_000, np.int32)
  with pytest.raises(ValueError, match=r"lengths must be at most \d+, got 10000"):
    m.pages_to_reach(lengths)
