"""A tuple of caches as one cache: windows that let pages go, whole programs, and bad arguments."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from story import config, ids
from tracing import host_calls

import paged_jax
from paged_jax import jitted
from paged_jax.testing import assert_in_place, invariants, replay

STEPS, S = 100, 3
ROWS = np.arange(S, dtype=np.int32)
BOTH = config(), config(page_size=2, window=3)


def one_head(**fields):
  fields = dict(num_rows=S, num_layers=1, num_kv_heads=1, head_dim=4, max_length=STEPS) | fields
  return config(**fields)


def windowed(size, window):
  """A cache with one page more than three rows that decode may hold behind no window."""
  return one_head(page_size=size, window=window, num_pages=S * (-(-(window - 1) // size) + 1) + 1)


def decoded(caches, new, poisoned=True):
  """A hundred steps of decoding in all caches, a token per row and step; row r begins in step 5r.

  `new` f32[K,3,S,D] are queries, keys and values of each step. The first cache keeps all tokens.

  Returns:
    The caches; then of each step the tables and free pages of each cache, what the first cache
    attends to with the window of each other one [W,S,1,D], and what these attend to, a tuple.
  """
  windows = jnp.array([each.ledger.window for each in caches[1:]], jnp.int32)

  def step(caches, now):
    i, (q, k, v) = now
    active = i >= 5 * ROWS
    caches, info = paged_jax.extend(caches, active.astype(jnp.int32))
    caches = replay.poison(caches) if poisoned else caches
    plans = paged_jax.plan(caches, jnp.where(active, ROWS, S), caches[0].lengths - 1)
    q, k, v = (x[:, None] for x in (q, k, v))
    caches = tuple(paged_jax.write(each, 0, k, v, plan) for each, plan in zip(caches, plans))
    outs = tuple(paged_jax.attend(each, 0, q, plan) for each, plan in zip(caches[1:], plans[1:]))
    wanted = jax.lax.map(
      lambda window: paged_jax.attend(caches[0], 0, q, plans[0], window=window), windows
    )
    tables = tuple(each.ledger.tables for each in caches)
    return caches, (tables, info, wanted, outs)

  return jax.lax.scan(step, caches, (jnp.arange(STEPS, dtype=jnp.int32), new))


NEW = np.random.default_rng(0).standard_normal((STEPS, 3, S, 4), np.float32)


@pytest.mark.parametrize(
  "sizes",
  [((1, 1), (1, 7), (5, 6)), ((16, 17), (64, 1), (16, 120))],
  ids=["small pages", "large pages"],
)
def test_a_window_lets_pages_go_and_changes_no_number_although_rows_reuse_them(sizes):
  uniform = one_head(page_size=8, num_pages=S * 13)
  caches = paged_jax.init((uniform, *(windowed(*each) for each in sizes)))
  caches, (tables, info, wanted, outs) = jax.tree.map(np.asarray, jax.jit(decoded)(caches, NEW))
  invariants.check(caches)
  assert info.ok.all()
  for nth, (size, window) in enumerate(sizes, start=1):
    np.testing.assert_allclose(outs[nth - 1], wanted[:, nth - 1], rtol=1e-5, atol=1e-6)
    own, none = tables[nth], caches[nth].ledger.pool.num_pages
    np.testing.assert_array_equal(own.lengths, tables[0].lengths)
    np.testing.assert_array_equal(own.starts, np.maximum(own.lengths - window, 0))
    columns = np.arange(own.block_tables.shape[-1])
    live = columns >= own.starts[..., None] // size
    live &= columns < -(-own.lengths // size)[..., None]
    np.testing.assert_array_equal(own.block_tables < none, live)  # none behind the window is left
    np.testing.assert_array_equal(none - info.num_free[nth], live.sum((1, 2)))
    tenants = [(own.block_tables == page).any((0, 2)).sum() for page in range(none)]
    assert (max(tenants) > 1) == (window < 100), (size, window)  # rows reuse others' pages


def abstract(configs):
  return jax.eval_shape(lambda: paged_jax.init(configs))


def test_a_hundred_steps_in_all_groups_are_one_program_in_place_that_calls_no_host():
  pair = one_head(num_pages=256, head_dim=16), one_head(num_pages=64, head_dim=16, window=9)
  new = jax.ShapeDtypeStruct((STEPS, 3, S, 16), jnp.float32)
  run = functools.partial(decoded, poisoned=False)
  assert host_calls(run, abstract(pair), new) == set()
  assert_in_place(run, abstract(pair), new)


BIG = tuple(dataclasses.replace(each, num_pages=512, head_dim=16, num_layers=4) for each in BOTH)


@pytest.mark.parametrize("verb", [paged_jax.extend, paged_jax.unshare], ids=lambda x: x.__name__)
def test_no_verb_copies_a_pool_of_the_tuple_also_under_vmap(verb):
  caches, operand = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), (abstract(BIG), ROWS)
  )
  assert_in_place(jax.vmap(verb), caches, operand)


def test_tuples_of_a_batch_that_need_different_work_do_not_disturb_each_other():
  def story(caches, counts):
    caches, a = paged_jax.extend(caches, counts)
    caches, b = paged_jax.fork(caches, ids(0), ids(2))
    caches, c = paged_jax.extend(caches, counts)  # copies pages, passes some, lacks others
    return caches, (a, b, c)

  counts = jnp.array([[3, 6, 0], [5, 1, 9]], jnp.int32)
  batch = jax.tree.map(lambda x: jnp.stack([x, x]), paged_jax.init(BOTH))
  together = jax.jit(jax.vmap(story))(batch, counts)
  run = jax.jit(story)
  alone = [run(paged_jax.init(BOTH), each) for each in counts]
  oks = [[info.ok.tolist() for info in infos] for _, infos in alone]
  short = [True, True, False]
  assert oks == [[[True] * 3, [True], [True] * 3], [short, [True], short]]
  chex.assert_trees_all_equal(together, jax.tree.map(lambda *x: jnp.stack(x), *alone))


def test_all_caches_of_a_donated_tuple_are_gone():
  before = jitted.init(BOTH)
  after, _ = jitted.extend(before, ids(1, 0, 0))
  for old, new in zip(before, after):
    assert old.pages.kv.is_deleted() and not new.pages.kv.is_deleted()
    with pytest.raises(ValueError, match="extend: this cache was donated"):
      jitted.extend(old, ids(1, 0, 0))


def test_a_token_without_a_slot_of_its_own_in_one_group_has_none_in_any():
  caches, _ = jitted.extend(jitted.init(BOTH), ids(6, 1, 0))
  caches, _ = jitted.hold(caches, (ids(8), ids(2)))  # of row 0's tokens 4 and 5, in one group
  plans = jitted.plan(caches, ids(0, 0, 1), ids(3, 4, 0))
  for cache, plan in zip(caches, plans):
    assert plan.ok.tolist() == [True, False, True]
    slots = cache.ledger.pool.num_pages * cache.ledger.page_size
    assert (plan.slots < slots).tolist() == [True, False, True]
  with pytest.raises(ValueError, match=r"token 1 \(row 0, position 4\) is on a page that others"):
    paged_jax.check_plan(caches, plans)


def test_attention_keeps_to_the_window_of_its_cache_also_where_pages_remain():
  rows, positions = ids(*[0] * 6), np.arange(6, dtype=np.int32)
  q, k, v = np.random.default_rng(0).standard_normal((3, 6, 1, 4), np.float32)

  @jax.jit
  def outs(cache, windows):
    cache, _ = paged_jax.extend(cache, ids(6, 0, 0))
    plan = paged_jax.plan(cache, rows, positions)
    cache = paged_jax.write(cache, 0, k, v, plan)
    attend = functools.partial(paged_jax.attend, cache, 0, q, plan)
    traced = jax.lax.map(lambda window: attend(window=window), windows)
    return attend(), attend(window=2), attend(window=100), traced

  windows = jnp.array([2, 3, 100, 2**31 - 1], jnp.int32)
  own, two, many, traced = outs(paged_jax.init(one_head(window=3)), windows)
  whole, *_, wanted = outs(paged_jax.init(one_head()), windows)
  assert np.abs(own - whole)[3:].min() > 1e-6
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(two, wanted[0])
  close(traced[0], wanted[0])
  for out in (own, many, *traced[1:]):
    close(out, wanted[1])


K = jnp.zeros((1, 2, 2))
MISUSES = {  # a call with the caches and their plans, what the error says
  "extend a list": (lambda c, p: paged_jax.extend(list(c), ROWS), "tuple of them, got list"),
  "extend no caches": (lambda c, p: paged_jax.extend((), ROWS), r"same num_rows and .*\[\]"),
  "extend plans": (lambda c, p: paged_jax.extend(p, ROWS), "tuple of them, got Plan"),
  "extend two counts": (lambda c, p: paged_jax.extend(c, (ROWS, ROWS)), "num_tokens.*tuple"),
  "write to both": (lambda c, p: paged_jax.write(c, 0, K, K, p), "cache must be a Cache in write"),
  "attend to both": (lambda c, p: paged_jax.attend(c, 0, K, p), "cache must be a Cache in attend"),
  "write with both plans": (lambda c, p: paged_jax.write(c[0], 0, K, K, p), "plan must be a Plan"),
  "check one plan": (lambda c, p: paged_jax.check_plan(c, p[0]), "plan must be a tuple of 2.*Plan"),
  "check two plans": (lambda c, p: paged_jax.check_plan(c[0], p), "plan must be no tuple.*tuple of"),
  "hold of one": (lambda c, p: paged_jax.hold(c, ROWS), "pages must be a tuple of 2"),
  "scrub of one": (lambda c, p: paged_jax.scrub(c, ROWS), "pages must be a tuple of 2"),
  "offload of three": (lambda c, p: paged_jax.offload(c, (ROWS,) * 3), "pages.*got a tuple of 3"),
  "restore one count": (
    lambda c, p: paged_jax.restore(c, paged_jax.offload(c, (ROWS, ROWS)), ROWS[0]),
    "count must be a tuple of 2",
  ),
  "restore one group": (
    lambda c, p: paged_jax.restore(c, paged_jax.offload(c, (ROWS, ROWS))[:1], (ROWS[0], ROWS[0])),
    "images must be a tuple of 2.*got a tuple of 1",
  ),
  "swap to one size": (
    lambda c, p: paged_jax.swap_out(c, ROWS[0], num_pages=2), "num_pages must be a tuple of 2",
  ),
  "swap one image": (
    lambda c, p: paged_jax.swap_in(c, ROWS[0], paged_jax.swap_out(c[0], ROWS[0])[1]),
    "image must be a tuple of 2.*got Image",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_a_wrong_form_of_an_argument_is_named_while_tracing(name):
  call, message = MISUSES[name]

  def traced(caches):
    return call(caches, paged_jax.plan(caches, ids(0), ids(0)))

  with pytest.raises(ValueError, match=message):
    jax.eval_shape(traced, abstract(BOTH))
