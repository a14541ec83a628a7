"""What broke for users of other caches, a class at a time, held against the manager."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from managed import (
  FIVE,
  SHAPE,
  SIX,
  Story,
  begin,
  check_bytes,
  fill,
  fingerprints,
  grow,
  manager,
  refused,
  store,
)

import paged_jax
from paged_jax import jitted
from paged_jax.host import Manager, Request, errors, eviction
from paged_jax.testing import replay


def poison(m):
  m._state.cache = replay.poison(m.cache)


# 1 Stale page content


class Poisoned(Story):
  """Random operations with NaN in every free page before each."""

  def step(self):
    poison(self.manager)
    super().step()


@pytest.mark.parametrize("options", [{}, dict(spill=True, num_host_pages=3)])
def test_nan_in_free_pages_never_reaches_anybody(options):
  story = Poisoned(np.random.default_rng(0), manager(options))
  for _ in range(150):
    story.step()
    story.check()
  assert story.count > 20 and np.isnan(np.asarray(story.manager.cache.pages.kv)).any()
  story.end()


def test_nan_of_a_former_tenant_is_not_read_and_not_attended_to():
  m = manager()
  nan = np.full((24, *SHAPE), np.nan, np.float32)
  for handle in m.allocate_many([Request("a", 24), Request("x", 8)]):
    for layer in range(2):
      m.write_kv(handle, layer, 0, nan[: handle.num_tokens], nan[: handle.num_tokens])
  m.deallocate_many(["a", "x"])
  assert np.isnan(np.asarray(m.cache.pages.kv)).all()
  handle = begin(m, FIVE, "b")
  check_bytes(m, handle, FIVE)
  plan = jitted.plan(m.cache, jnp.array([handle.row], jnp.int32), jnp.array([4], jnp.int32))
  out = jitted.attend(m.cache, jnp.int32(0), jnp.ones((1, *SHAPE), jnp.float32), plan)
  assert np.isfinite(np.asarray(out)).all()


def test_nan_behind_a_shared_prefix_stays_with_its_writer():
  m = manager()
  parent = begin(m, [1, 2, 3, 4, 5, 6, 7])
  nan = np.full((2, *SHAPE), np.nan, np.float32)
  m.write_kv(parent, 0, 5, nan, nan)
  m.store_prefix(parent, FIVE)
  child = m.allocate(Request("b"))
  m.share_prefix(parent, child, 5)
  m.extend(child, 2)
  hit = m.allocate(Request("c", 7, tokens=[*FIVE, 9]))
  assert hit.num_cached == 5
  for handle in (child, hit):
    k, v = m.read_kv(handle, 0, 0, 7)
    assert np.isfinite(k).all() and np.isfinite(v).all() and not k[5:].any()


# 2 A page freed while a transfer reads or writes it


def test_pages_freed_by_a_swap_are_overwritten_while_the_images_are_on_their_way():
  m = manager()
  handles = {name: begin(m, [n] * 8, name) for n, name in enumerate("abc")}
  for _ in range(3):
    for n, name in enumerate("abc"):
      m.swap_out(handles[name])
      m.deallocate(begin(m, [9] * 8, "x").request_id)
      poison(m)
      m.swap_in(handles[name])
      check_bytes(m, handles[name], [n] * 8)


def test_a_read_that_was_dispatched_sees_the_pages_as_they_were():
  m = manager()
  handle = begin(m, SIX)
  k, v = jitted.gather(m.cache, jnp.int32(0), jnp.array([handle.row], jnp.int32))
  m.deallocate("a")
  poison(m)
  begin(m, [9] * 24, "b")
  np.testing.assert_array_equal(k[0, :6], replay.values(fingerprints(SIX), 0, SHAPE))
  np.testing.assert_array_equal(v[0, :6], replay.values(fingerprints(SIX), ~0, SHAPE))


@functools.partial(jax.jit, donate_argnums=0)
def grow_and_write(cache, rows, asked, k):
  """A program that writes the tokens for which it makes room."""
  positions = cache.lengths[rows]
  cache, _ = paged_jax.extend(cache, asked)
  plan = paged_jax.plan(cache, rows, positions)
  cache = paged_jax.write(cache, 0, k, -k, plan)
  return cache, paged_jax.Log(((asked[None],),), ("extend",)), plan.ok


def test_a_sequence_that_ends_while_its_program_runs_leaves_its_pages_to_others_whole():
  m = manager()
  a = begin(m, [1, 2, 3, 4])
  rows, k = np.array([a.row], np.int32), np.full((1, *SHAPE), 7, np.float32)
  m.run(grow_and_write, rows, np.array([1, 0, 0], np.int32), k)
  m.deallocate("a")
  others = [begin(m, [n] * length, n) for n, length in enumerate((24, 8))]  # every page
  for n, other in enumerate(others):
    check_bytes(m, other, [n] * other.num_tokens)
  assert m.stats().free_pages == 0 and m.audit().clean


# 3 Double free


def test_a_page_is_never_given_back_twice():
  m = manager()
  parent = begin(m, SIX)
  child = parent.clone("b")
  m.store_prefix(parent)
  m.swap_out(child)
  for name in ("a", "b"):
    m.deallocate(name)
    with refused(m, errors.UnknownRequest):
      m.deallocate(name)
  m.evict_prefixes(1)
  m.evict_prefixes(1), m.clear_prefixes(), m.gc(8)
  pool = m.cache.ledger.pool
  assert int(pool.refcount.min()) == 0 == int(pool.refcount.max()) == int(pool.holds.max())
  stats = m.stats()
  assert stats.free_pages == 8 and stats.pages_taken == stats.pages_released == 2
  assert stats.free_host_pages == 16


# 4 Lookup and allocate


def test_hits_are_kept_before_pages_are_taken():
  m = manager(dict(eviction=eviction.FIFO))  # a hit does not make it younger
  store(m, [1] * 8)  # would go first
  store(m, [2] * 24, "b")
  assert m.stats().free_pages == 0
  tokens = [1] * 8 + [3] * 16
  handle = begin(m, tokens, "c")
  assert handle.num_cached == 8 and m.stats().evicted_pages == 4
  check_bytes(m, handle, tokens)
  assert m.find_prefix([2] * 24).length == 8


def test_the_hits_of_a_whole_batch_are_kept_before_pages_are_taken():
  m = manager(dict(eviction=eviction.FIFO))  # a hit does not make it younger
  store(m, [1] * 8), store(m, [2] * 8, "b"), store(m, [3] * 16, "c")
  prompts = [[1] * 8 + [4] * 8, [2] * 8 + [4] * 8]
  handles = m.allocate_many([Request(i, tokens=tokens) for i, tokens in enumerate(prompts)])
  assert [handle.num_cached for handle in handles] == [8, 8]
  for handle, tokens in zip(handles, prompts):
    fill(m, handle, tokens, 8)
    check_bytes(m, handle, tokens)
  assert m.find_prefix([3] * 16).length == 0


def test_idle_pages_of_a_hit_count_as_consumed():
  m = manager()
  store(m, [1] * 8)
  m.allocate(Request("b", 12))
  request = Request("c", tokens=[1] * 8 + [3] * 16)  # 4 new pages, 3 free, and 2 that it hits
  assert m.available_pages == 5 and not m.can_allocate(request)
  with refused(m, errors.OutOfPages, "6 pages are needed, but 5 are free"):
    m.allocate(request)
  assert m.find_prefix([1] * 8).length == 8


# 5 Deadlock when the pool is full


@pytest.mark.parametrize(
  "prompt", [[7] * 24, [7] * 23, [*[7] * 23, 8]], ids=["the same", "a shorter one", "another end"]
)
def test_a_request_that_fits_without_its_hit_is_not_refused_for_it(prompt):
  m = manager()
  store(m, [7] * 24)
  m.allocate(Request("b", 8))  # the prefix has all other pages, and nobody uses it
  request = Request("c", tokens=prompt)
  assert m.available_pages == 6 and m.can_allocate(request)
  handle = begin(m, prompt, "c")
  check_bytes(m, handle, prompt)


def test_an_impossible_request_is_refused_at_once_and_evicts_nothing():
  m = manager(num_pages=1)
  store(m, FIVE[:4])
  for request in (Request("b", 5), Request("b", 24), Request("b", 25), Request("b", max_length=25)):
    assert not m.can_allocate(request)
    with refused(m, (errors.OutOfPages, errors.TooLong)):
      m.allocate(request)
  assert m.find_prefix(FIVE).length == 4


def test_whoever_holds_pages_finishes_in_a_pool_too_small_for_all():
  m = manager(dict(num_host_pages=32))
  tokens = {name: [n] * 24 for n, name in enumerate("abc")}  # 18 pages in a pool of 8
  handles = {name: begin(m, tokens[name][:1], name) for name in "abc"}
  for _ in range(100):
    if not handles:
      break
    name = next(iter(handles))
    handle = handles.pop(name)
    try:
      if handle.is_swapped:
        m.swap_in(handle)
      grow(m, handle, tokens[name][: handle.num_tokens + 3])
    except errors.OutOfPages:
      victim = next(each for each in reversed(handles.values()) if not each.is_swapped)
      m.swap_out(victim)
    except errors.TooLong:
      grow(m, handle, tokens[name])
    if handle.num_tokens == 24:
      check_bytes(m, handle, tokens[name])
      m.deallocate(name)
    else:
      handles[name] = handle
  assert not handles and m.stats().free_pages == 8 and m.stats().pages_swapped_out > 0


# 6 Hash collisions and poisoning


class Same:
  """Hashes like any other of its kind, and equals only itself."""

  def __hash__(self):
    return 0


@pytest.mark.parametrize(
  ("namespace", "tokens", "other", "query"),
  [
    (None, SIX, (1, 2, 3), [4, 5, 6]),
    ((1, 2, 3), [4, 5, 6], None, SIX),
    ("adapter", FIVE, None, FIVE),
    (None, FIVE, "adapter", FIVE),
    ("a", FIVE, ("a",), FIVE),
    (np.array(FIVE, "<i4").tobytes(), FIVE, None, [*FIVE, *FIVE]),
    (-1, FIVE, -2, FIVE),
    (Same(), FIVE, Same(), FIVE),
    (1, FIVE, "1", FIVE),
    (0, FIVE, None, FIVE),
  ],
)
def test_no_namespace_is_taken_for_another_or_for_tokens(namespace, tokens, other, query):
  assert hash(-1) == hash(-2) and hash(Same()) == hash(Same())
  m = manager()
  handle = begin(m, tokens, namespace=namespace)
  m.store_prefix(handle, last_logits="secret")
  assert m.find_prefix(query, other) == (0, None, [])
  assert m.allocate(Request("b", tokens=query, namespace=other)).num_cached == 0
  assert m.find_prefix(tokens, namespace).last_logits == "secret"


@pytest.mark.parametrize(
  ("stored", "query", "length"),
  [
    ([256, 1], [1, 256], 0),
    ([1], [1 + 2**8], 0),
    ([1], [1 + 2**24], 0),
    ([0, 0, 1], [0, 1], 1),
    ([0] * 5, [0] * 4, 4),
    ([2**31 - 1, 7], [2**31 - 1, 8], 1),
    ([12, 3], [1, 23], 0),
    ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 6, 5, 7, 8], 4),
  ],
)
def test_tokens_are_compared_as_they_are(stored, query, length):
  m = manager()
  store(m, stored, last_logits="L")
  match = m.find_prefix(query)
  assert match.length == length and match.last_logits is None


# 7 Silent layout misreads


@pytest.mark.parametrize("axes", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_keys_with_their_axes_exchanged_are_refused(axes):
  m = manager(num_pages=1, num_kv_heads=3)
  handle = m.allocate(Request("a", 4))
  k = np.ones((4, 3, 2), np.float32)
  with refused(m, errors.ShapeMismatch, r"must be \('B', 3, 2\)"):
    m.write_kv(handle, 0, 0, k.transpose(axes), k.transpose(axes))


def test_heads_and_columns_keep_their_places_through_swap_and_prefix():
  m = manager(num_pages=1, num_kv_heads=3)
  handle = m.allocate(Request("a", tokens=[1, 2, 3, 4]))
  k = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
  for layer in range(2):
    m.write_kv(handle, layer, 0, k + 100 * layer, -k)
  m.swap_out(handle)
  m.swap_in(handle)
  m.store_prefix(handle, last_logits="L")
  m.deallocate("a")
  handle = m.allocate(Request("b", tokens=[1, 2, 3, 4]))
  for layer in range(2):
    got_k, got_v = m.read_kv(handle, layer, 0, 4)
    np.testing.assert_array_equal(got_k, k + 100 * layer)
    np.testing.assert_array_equal(got_v, -k)


# 8 Draft tokens, windows, tails


def test_draft_tokens_that_were_trimmed_are_not_stored():
  m = manager()
  handle = begin(m, FIVE)
  m.extend(handle, 3)
  m.record(np.array([[6], [66], [67]], np.int32) * np.ones((3, 3), np.int32), np.array([3, 0, 0]))
  m.trim(handle, 6)  # one draft was right
  m.store_prefix(handle)
  assert m.find_prefix([*FIVE, 6, 66, 67]).length == 6
  m.extend(handle, 1)
  m.record(np.full((1, 3), 7, np.int32), np.array([1, 0, 0]))
  m.store_prefix(handle)
  assert m.find_prefix([*FIVE, 6, 7]).length == 7


def test_room_without_tokens_is_not_stored():
  m = manager()
  handle = begin(m, FIVE)
  m.extend(handle, 3)
  m.store_prefix(handle)
  assert m.find_prefix([*FIVE, 0, 0, 0]).length == 5


def test_a_window_frees_a_page_only_when_all_of_it_has_passed():
  m = manager()
  tokens = [*range(10)]
  handle = begin(m, tokens)
  for start, pages in ((3, 3), (4, 2), (7, 2), (8, 1)):
    m.slide(handle, start)
    assert len(handle.pages) == pages
    poison(m)
    check_bytes(m, handle, tokens, start=start)


def test_tails_are_freed_before_their_ancestors():
  m = manager()
  tokens = [*range(22)]
  store(m, tokens)
  lengths = []
  for free in range(3, 9):
    assert m.gc(free).num_pages == 1
    lengths.append(m.find_prefix(tokens).length)
    assert m.audit().clean
  assert lengths == [20, 16, 12, 8, 4, 0]


def test_branches_are_freed_before_their_trunk():
  m = manager()
  trunk = [1] * 4
  store(m, trunk)
  store(m, [*trunk, *[2] * 4])
  store(m, [*trunk, *[3] * 4])
  assert m.stats().free_pages == 5
  m.gc(7)
  assert m.find_prefix([*trunk, 2]).length == 4 == m.find_prefix([*trunk, 3]).length


# 9 Recompiles


def serve(m, lengths):
  """Requests of these lengths come, grow a token at a time, share, move and go."""
  for n, length in enumerate(lengths):
    handle = begin(m, [*range(length)], ("a", n))
    for step in range(3):
      m.extend(handle, 1 + step % 2)
    handle.clone(("b", n))
    m.extend(handle, 1)
    m.swap_out(handle)
    m.swap_in(handle)
    m.store_prefix(handle)
    m.read_kv(handle, n % 2, n % length, 1)
    m.trim(handle, length)
    m.deallocate_many([("a", n), ("b", n)])
    m.evict_prefixes(n % 2)
  m.clear_prefixes()


def test_nothing_compiles_in_steady_state(compiled):
  m = manager()
  serve(m, [1, 5, 9, 12, 3])
  compiled.clear()
  serve(m, [2, 4, 6, 7, 8, 10, 11, 2, 5])
  assert compiled == []
  jax.jit(lambda x: x + 17)(jnp.float32(1))
  assert compiled  # it would have been noticed


def test_another_manager_of_the_same_configuration_compiles_nothing(compiled):
  serve(manager(), [1, 5, 9, 12, 3])
  compiled.clear()
  serve(manager(), [2, 6])
  assert compiled == []


# 10 Host sync for allocation


def shapes_only(verb):
  """A verb that returns shapes, which nobody can read."""
  return lambda *args, **static: jax.eval_shape(functools.partial(verb, **static), *args)


def unreadable():
  """A manager whose device is only shapes: whoever reads it gets an error."""
  verbs = ("extend", "fork", "unshare", "trim", "slide", "free", "hold", "drop", "adopt", "plan",
           "write", "offload", "restore", "gather", "scrub")  # fmt: skip
  m = manager(dict(scrub=True))
  m._state.verbs = types.SimpleNamespace(
    **{name: shapes_only(getattr(paged_jax, name)) for name in verbs}
  )
  m._state.cache = jax.eval_shape(lambda: jitted.init(m.config))
  return m


def test_no_decision_waits_for_the_device():
  m = unreadable()
  store(m, SIX)
  handle = begin(m, [*FIVE, 9])
  child = handle.clone("b")
  m.extend(child, 3)
  m.cow_copy(child), m.trim(child, 6), m.slide(handle, 4), m.swap_out(child)
  with pytest.raises(errors.OutOfPages):
    m.allocate_many([Request("c", 24), Request("d", 24)])
  m.swap_in(child), m.gc(8), m.stats(), m.available_pages, m.can_allocate(Request("c", 24))
  m.evict_prefixes(1), m.clear_prefixes()
  m.deallocate_many(["a", "b"])
  assert m.stats().free_pages == 8
  with pytest.raises(TypeError):
    int(m.cache.num_free)  # a read would have been noticed


# 11 Silent fallback


def test_an_operation_that_is_off_is_refused_and_not_replaced_by_another():
  m = manager(dict(swapping=False, num_host_pages=0), copy_on_write=False)
  handle = begin(m, SIX)
  for use in (lambda: m.swap_out(handle), lambda: m.cow_copy(handle), lambda: handle.clone("b")):
    with refused(m, errors.Disabled, "is off"):
      use()
  check_bytes(m, handle, SIX)


def test_verbs_that_were_passed_in_are_the_ones_that_run():
  used = []

  def counted(cache, num_tokens):
    used.append(num_tokens.tolist())
    return jitted.extend(cache, num_tokens)

  plain = manager()
  verbs = types.SimpleNamespace(**(vars(jitted) | dict(extend=counted)))
  Manager(plain.config, plain.options, verbs=verbs).allocate(Request("a", 5))
  assert used == [[5, 0, 0]]


# 12 A generation that runs out of pages


def test_a_sequence_that_runs_out_of_pages_takes_nobody_with_it():
  m = manager()
  a, b, c = (begin(m, [n] * 8, name) for n, name in enumerate("abc"))
  grow(m, a, [0] * 16)
  with refused(m, errors.OutOfPages, "1 pages are needed, but 0 are free"):
    m.extend(b, 1)
  check_bytes(m, a, [0] * 16)
  check_bytes(m, b, [1] * 8)
  m.deallocate("a")
  grow(m, b, [1] * 12)
  grow(m, c, [2] * 12)
  check_bytes(m, b, [1] * 12)
  check_bytes(m, c, [2] * 12)
