"""The verbs as parts of a program: bad arguments, transforms, donation, no call of the host."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import checkify
from story import config, empty, extend, ids, pages_of, read, write
from tracing import host_calls

import paged_jax
from paged_jax import jitted
from paged_jax.testing import assert_in_place, invariants, replay

ROWS = jnp.arange(3, dtype=jnp.int32)


# Bad arguments.

K = jnp.zeros((1, 2, 2))


def of_dtype(pages):
  return dataclasses.replace(pages, dtype=np.dtype("float16"))


def swap_in(cache, pages):
  return paged_jax.swap_in(cache, ROWS[0], paged_jax.Image(pages, ROWS[0], ROWS[1]))


MISUSES = {
  "extend a list": (lambda c, p: paged_jax.extend(c, [1, 1, 1]), "num_tokens.*list"),
  "extend floats": (lambda c, p: paged_jax.extend(c, jnp.ones(3)), "num_tokens.*float32"),
  "extend too few": (lambda c, p: paged_jax.extend(c, ids(1)), r"num_tokens.*\[3\].*\[1\]"),
  "needed rank": (lambda c, p: paged_jax.pages_needed(c, ROWS[None]), r"num_tokens.*\[1, 3\]"),
  "plan int": (lambda c, p: paged_jax.plan(c, 0, ids(0)), "rows.*int"),
  "plan sizes": (lambda c, p: paged_jax.plan(c, ids(0), ids(0, 1)), r"positions.*\[1\].*\[2\]"),
  "plan backend": (
    lambda c, p: paged_jax.plan(c, ids(0), ids(0), implementation="abacus"),
    "implementation.*abacus",
  ),
  "write heads": (lambda c, p: paged_jax.write(c, 0, K[:, :1], K, p), r"k must.*\[1, 2, 2\]"),
  "write no values": (lambda c, p: paged_jax.write(c, 0, K, None, p), "v must be an array.*None"),
  "write ints": (lambda c, p: paged_jax.write(c, 0, K, ids(1), p), "v must.*int32"),
  "extend beyond int32": (
    lambda c, p: paged_jax.extend(c, np.array([2**32 + 1, 0, 0])),
    "num_tokens must fit in int32",
  ),
  "plan nothing": (lambda c, p: paged_jax.plan(c, ids(), ids()), r"rows must.*\[any\].*\[0\]"),
  "write numpy layer": (lambda c, p: paged_jax.write(c, np.int32(-1), K, K, p), "layer.*-1"),
  "window float": (lambda c, p: paged_jax.attend(c, 0, K, p, window=2.5), "window.*2.5"),
  "window beyond int32": (lambda c, p: paged_jax.attend(c, 0, K, p, window=2**31), "window.*int32"),
  "softcap numpy": (lambda c, p: paged_jax.attend(c, 0, K, p, softcap=np.float32(-1)), "softcap"),
  "write layer": (lambda c, p: paged_jax.write(c, 2, K, K, p), r"layer.*\[0, 2\).*2"),
  "gather layer": (lambda c, p: paged_jax.gather(c, -1, ids(0)), "layer.*-1"),
  "gather tokens": (lambda c, p: paged_jax.gather(c, 0, ids(0), num_tokens=25), "num_tokens.*25"),
  "attend heads": (lambda c, p: paged_jax.attend(c, 0, jnp.zeros((1, 3, 2)), p), "q.*3"),
  "attend dim": (lambda c, p: paged_jax.attend(c, 0, jnp.zeros((1, 2, 4)), p), "q.*4"),
  "fork sizes": (lambda c, p: paged_jax.fork(c, ids(0), ids(1, 2)), "dst.*2"),
  "fork tokens": (lambda c, p: paged_jax.fork(c, ids(0), ids(1), ids(1, 2)), "num_tokens.*2"),
  "reorder sizes": (lambda c, p: paged_jax.reorder(c, ids(0)), r"sources.*\[3\]"),
  "unshare bool": (lambda c, p: paged_jax.unshare(c, ROWS > 0), "starts.*bool"),
  "trim sizes": (lambda c, p: paged_jax.trim(c, ids(0)), "lengths"),
  "slide sizes": (lambda c, p: paged_jax.slide(c, ids(0)), "starts"),
  "free ints": (lambda c, p: paged_jax.free(c, ROWS), "rows.*bool.*int32"),
  "hold scalar": (lambda c, p: paged_jax.hold(c, jnp.int32(0)), "pages"),
  "drop floats": (lambda c, p: paged_jax.drop(c, jnp.ones(1)), "pages.*float32"),
  "adopt pages": (lambda c, p: paged_jax.adopt(c, ids(0), ids(0), ids(1)), "pages"),
  "offload list": (lambda c, p: paged_jax.offload(c, [0]), "pages.*list"),
  "restore nothing": (lambda c, p: paged_jax.restore(c, (), jnp.int32(0)), "images.*none"),
  "restore image": (
    lambda c, p: paged_jax.restore(
      c, [*paged_jax.offload(c, ids(0)), jax.tree.map(lambda x: x[0, :1], c.pages)], jnp.int32(1)
    ),
    r"images\[1\]",
  ),
  "restore dtype": (
    lambda c, p: paged_jax.restore(c, [of_dtype(paged_jax.offload(c, ids(0))[0])], jnp.int32(1)),
    r"images\[0\].*float32.*float16",
  ),
  "restore int": (lambda c, p: paged_jax.restore(c, paged_jax.offload(c, ids(0)), 1), "count.*int"),
  "scrub scalar": (lambda c, p: paged_jax.scrub(c, jnp.int32(0)), "pages"),
  "gather float": (lambda c, p: paged_jax.gather(c, 0, ids(0), num_tokens=2.0), "num_tokens.*2.0"),
  "swap row": (lambda c, p: paged_jax.swap_out(c, ids(0)), "row"),
  "swap image": (
    lambda c, p: swap_in(c, jax.tree.map(lambda x: x[:, :1], c.pages)),
    r"image\.pages must",
  ),
  "swap head dim": (
    lambda c, p: swap_in(c, dataclasses.replace(c.pages, head_dim=1)),
    "image.pages must.*head_dim 2, got.*head_dim 1",
  ),
  "swap value dim": (
    lambda c, p: swap_in(c, dataclasses.replace(c.pages, value_dim=1)),
    "image.pages must.*value_dim None .*, got.*value_dim 1",
  ),
  "restore head dim": (
    lambda c, p: paged_jax.restore(
      c, [dataclasses.replace(paged_jax.offload(c, ids(0))[0], head_dim=1)], jnp.int32(1)
    ),
    r"images\[0\].*head_dim 2, got.*head_dim 1",
  ),
  "swap dtype": (lambda c, p: swap_in(c, of_dtype(c.pages)), r"image\.pages must.*float16"),
  "swap pages": (lambda c, p: paged_jax.swap_out(c, jnp.int32(0), num_pages=7), "num_pages.*7"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_wrong_argument_is_named_while_tracing(name):
  call, message = MISUSES[name]
  cache = empty()
  plan = jitted.plan(cache, ids(0), ids(0))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(call, cache, plan) if name != "extend a list" else call(cache, plan)


def test_values_that_are_channels_of_keys_cannot_be_given():
  cache = abstract(config(value_dim=1))
  plan = jax.eval_shape(paged_jax.plan, cache, ids(0), ids(0))
  with pytest.raises(ValueError, match="v must be None: with value_dim=1"):
    jax.eval_shape(paged_jax.write, cache, 0, K, K, plan)


def test_a_cache_used_after_donation_says_so_plainly():
  cache = empty()
  jitted.extend(cache, ids(1, 1, 1))
  with pytest.raises(ValueError, match="extend: this cache was donated"):
    jitted.extend(cache, ids(1, 1, 1))


def test_numpy_operands_of_any_integer_width_are_accepted():
  cache, info = jitted.extend(empty(), np.array([1, 2, 3]))
  assert info.ok.all() and cache.lengths.tolist() == [1, 2, 3]


REFUSED = {
  "extend negative": lambda c: jitted.extend(c, ids(-1, 0, 0)),
  "extend beyond the row": lambda c: jitted.extend(c, ids(20, 0, 0)),
  "extend by the largest int": lambda c: jitted.extend(c, ids(2**31 - 1, 0, 0)),
  "fork onto a busy row": lambda c: jitted.fork(c, ids(0), ids(0)),
  "fork from no row": lambda c: jitted.fork(c, ids(3), ids(2)),
  "fork from a negative row": lambda c: jitted.fork(c, ids(-1), ids(2)),
  "fork more than there is": lambda c: jitted.fork(c, ids(0), ids(2), ids(6)),
  "fork a negative count": lambda c: jitted.fork(c, ids(0), ids(2), ids(-1)),
  "reorder from no row": lambda c: jitted.reorder(c, ids(4, 1, 2)),
  "reorder from a negative row": lambda c: jitted.reorder(c, ids(-1, 1, 2)),
  "unshare beyond the length": lambda c: jitted.unshare(c, ids(6, 0, 0)),
  "unshare negative": lambda c: jitted.unshare(c, ids(-1, 0, 0)),
  "trim upwards": lambda c: jitted.trim(c, ids(6, 2, 0)),
  "trim negative": lambda c: jitted.trim(c, ids(-1, 2, 0)),
  "slide beyond the length": lambda c: jitted.slide(c, ids(6, 0, 0)),
  "slide negative": lambda c: jitted.slide(c, ids(-1, 0, 0)),
  "free an empty row": lambda c: jitted.free(c, ROWS == 2),
  "hold a free page": lambda c: jitted.hold(c, ids(7)),
  "hold no such page": lambda c: jitted.hold(c, ids(9)),
  "hold a negative page": lambda c: jitted.hold(c, ids(-1)),
  "drop a page not held": lambda c: jitted.drop(c, ids(0)),
  "adopt a free page": lambda c: jitted.adopt(c, ids(2), ids(7)[None], ids(1)),
  "adopt a page not held": lambda c: jitted.adopt(c, ids(2), ids(0)[None], ids(1)),
  "adopt onto a busy row": lambda c: jitted.adopt(c, ids(0), ids(1)[None], ids(1)),
  "adopt more tokens than pages": lambda c: jitted.adopt(c, ids(2), ids(1)[None], ids(5)),
  "adopt a negative length": lambda c: jitted.adopt(c, ids(2), ids(1)[None], ids(-1)),
  "swap an empty row": lambda c: jitted.swap_out(c, jnp.int32(2))[::2],
  "swap no row": lambda c: jitted.swap_out(c, jnp.int32(-1))[::2],
  "swap more than the bucket": lambda c: jitted.swap_out(c, jnp.int32(0), num_pages=1)[::2],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_data_cannot_ask_is_refused_and_changes_nothing(name):
  cache, _ = write(extend(empty(), 5, 2, 0)[0], 0, [1, 2, 3, 4, 5])
  cache, _ = jitted.hold(cache, ids(1))
  before = jax.tree.map(np.array, cache)  # the verb takes the cache itself
  after, info = REFUSED[name](cache)
  assert not bool(info.ok.reshape(-1)[2 if "free" in name and "row" in name else 0])
  chex.assert_trees_all_equal(after, before)


def test_tokens_out_of_order_or_in_pieces_get_no_slot():
  cache, _ = extend(empty(), 8, 8, 0)
  plan = jitted.plan(cache, ids(0, 0, 0, 1, 0), ids(5, 3, 6, 0, 7))
  assert plan.ok.tolist() == [True, False, False, True, False]
  plan = jitted.plan(cache, ids(0, 0, 0, 1, 1), ids(4, 5, 5, 0, 1))  # a position named twice
  assert plan.ok.tolist() == [True, True, False, True, True]
  plan = jitted.plan(cache, ids(0, 0, 3, 1, 1), ids(5, 6, 0, 0, 1))
  assert plan.ok.all() and len(set(plan.slots.tolist())) == 5


def test_a_part_has_no_more_rows_than_it_may():
  cache, _ = extend(empty(), 3, 3, 3)
  rows, positions = ids(0, 3, 1, 1, 2, 3), ids(2, 0, 1, 2, 2, 0)
  plan = jitted.plan(cache, rows, positions, parts=((2, 3), (4, 1)))
  assert plan.ok.tolist() == [True, True, True, True, False, True]
  assert plan.slots[4] >= 9 * 4 and plan.parts[1].last.tolist() == [1, 2, -1, -1]
  with pytest.raises(
    ValueError, match=r"token 4 \(row 2, position 2\) is in one row more than its"
  ):
    paged_jax.check_plan(cache, plan)
  paged_jax.check_plan(cache, jitted.plan(cache, rows, positions, parts=((2, 3), (4, 2))))
  # row 1 comes in two parts, and is whole in neither
  plan = jitted.plan(cache, rows, positions, parts=((3, 2), (3, 2)))
  assert plan.ok.all()


def test_parts_change_only_how_attention_is_computed():
  cache, _ = extend(empty(), 5, 2, 7)
  rows, positions = ids(0, 1, 2, 2, 2, 2, 2, 2, 2, 3), ids(4, 1, *range(7), 0)
  new = jax.random.normal(jax.random.key(0), (3, 10, *K.shape[1:]))
  outs = []
  for parts in (None, ((10, 3),), ((2, 3), (8, 1)), ((2, 2), (3, 1), (5, 1))):
    plan = jitted.plan(cache, rows, positions, parts=parts)
    written = jax.jit(paged_jax.write)(cache, 0, new[0], new[1], plan)
    outs.append((plan.slots, plan.ok, written, jitted.attend(written, 0, new[2], plan)))
  for slots, ok, written, out in outs[1:]:
    chex.assert_trees_all_equal((slots, ok, written), outs[0][:3])
    np.testing.assert_allclose(out, outs[0][3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "parts, text",
  [
    (((2, 1),), "parts must have the batch's 3 tokens, got 2 in ((2, 1),)"),
    (((2, 1), (1, 0)), "parts must have at least one token and one row each, got"),
    ((3, 1), "parts must be pairs of tokens and rows, got (3, 1)"),
    (((3, 1.5),), "parts must be pairs of tokens and rows, got"),
  ],
)
def test_parts_that_are_not_the_batch_are_refused(parts, text):
  cache, _ = extend(empty(), 3, 0, 0)
  with pytest.raises(ValueError, match=re.escape(text)):
    paged_jax.plan(cache, ids(0, 0, 0), ids(0, 1, 2), parts=parts)


def test_a_traced_layer_out_of_range_is_not_taken_for_zeros():
  cache, _ = write(extend(empty(), 2, 0, 0)[0], 0, [1, 2])
  plan = jitted.plan(cache, ids(0), ids(1))
  for layer in (-1, 2):
    k, _ = jitted.gather(cache, jnp.int32(layer), ids(0))
    out = jitted.attend(cache, jnp.int32(layer), K + 1, plan)
    assert jnp.isnan(k).all() and jnp.isnan(out).all()
    by_reference = dataclasses.replace(plan, implementation="reference")
    assert jnp.isnan(jitted.attend(cache, jnp.int32(layer), K + 1, by_reference)).all()
    written = jax.jit(paged_jax.write)(cache, jnp.int32(layer), K + 9, K + 9, plan)
    assert jnp.isnan(jitted.attend(written, 1, K + 1, plan)).all()  # the last layer
    k, _ = jitted.gather(written, 0, ids(0), num_tokens=2)
    np.testing.assert_array_equal(k[0, :, 0, 0], [1, 2])  # the others are as they were


@pytest.mark.parametrize(
  "call, text",
  [
    (lambda c, p: paged_jax.attend(K, c, 0, p), "cache must be a Cache in attend.cache, layer, q,"),
    (lambda c, p: paged_jax.write(K, 0, K, K, p), "cache must be a Cache in write.cache, layer, k"),
    (
      lambda c, p: paged_jax.attend(c, 0, p, K),
      "plan must be a Plan in attend.cache, layer, q, pl",
    ),
    (
      lambda c, p: paged_jax.check_plan(p, c),
      "cache must be a Cache in check_plan.cache, plan., g",
    ),
  ],
)
def test_arguments_in_another_order_are_refused_with_the_order(call, text):
  cache, _ = extend(empty(), 2, 0, 0)
  with pytest.raises(ValueError, match=text):
    call(cache, paged_jax.plan(cache, ids(0), ids(1)))


def test_check_plan_says_why_of_the_first_ten_tokens():
  cache, _ = extend(empty(), 6, 0, 2)
  cache, _ = jitted.slide(cache, ids(1, 0, 0))
  cache, _ = jitted.fork(cache, ids(2), ids(1))
  cache, _ = jitted.free(cache, jnp.array([False, False, True]))
  cache, _ = jitted.fork(cache, ids(1), ids(2))
  good = jitted.plan(cache, ids(0, 0, 3, 3), ids(1, 5, 0, 99))  # S pads
  paged_jax.check_plan(cache, good)
  rows, positions = ids(0, 0, 0, 0, 1, *[0] * 7), ids(0, 3, 2, 6, 1, *range(7))
  bad = jitted.plan(cache, rows, positions)
  with pytest.raises(ValueError) as failure:
    paged_jax.check_plan(cache, bad)
  text = str(failure.value)
  assert text.startswith(f"{int((~bad.ok).sum())} of 12 tokens have no slot: token 0 (row 0, pos")
  for part in (
    "token 0 (row 0, position 0) is before the first live token of its row",
    "token 2 (row 0, position 2) does not ascend in its row, or its row comes in several pieces",
    "token 3 (row 0, position 6) is beyond its row's length",
    "token 4 (row 1, position 1) is on a page that others hold, too",
  ):
    assert part in text
  assert text.count("(row ") == 10
  for row in (-1, 4, 99):
    with pytest.raises(ValueError, match=r"token 1 \(row 3, position 0\) is in no row"):
      paged_jax.check_plan(cache, jitted.plan(cache, ids(0, row), ids(1, 0)))
  empty_row, _ = jitted.free(jax.tree.map(jnp.copy, cache), jnp.array([False, True, False]))
  with pytest.raises(ValueError, match=r"token 0 \(row 1, position 0\) is in an empty row"):
    paged_jax.check_plan(empty_row, jitted.plan(empty_row, ids(1), ids(0)))
  moved, _ = jitted.free(cache, jnp.array([True, True, True]))
  moved, _ = jitted.extend(moved, ids(0, 6, 0))
  moved, _ = jitted.extend(moved, ids(6, 0, 0))
  with pytest.raises(ValueError, match="not where the plan says: the cache has changed since"):
    paged_jax.check_plan(moved, good)


def test_check_plan_is_a_check_of_checkify_inside_a_program():
  cache, _ = extend(empty(), 6, 0, 2)

  def program(cache, rows, positions):
    plan = paged_jax.plan(cache, rows, positions)
    paged_jax.check_plan(cache, plan)
    return plan.slots

  run = jax.jit(checkify.checkify(program))
  error, _ = run(cache, ids(0, 2), ids(5, 1))
  error.throw()
  error, _ = run(cache, ids(0, 2), ids(5, 2))
  text = error.get()
  assert "tokens [1 2] (rows [ 2 -1], positions [ 2 -1]) have no slot, because of [ 2 -1]" in text
  assert "2 is beyond its row's length" in text


def test_a_verb_that_reads_traces_once_for_all_values():
  cache, _ = write(extend(empty(), 5, 2, 0)[0], 0, [1, 2, 3, 4, 5])
  plan = jitted.plan(cache, ids(0), ids(1))
  calls = {
    "pages_needed": lambda i: (cache, ids(i, 1, i)),
    "plan": lambda i: (cache, ids(0, i), ids(i, 1)),
    "gather": lambda i: (cache, jnp.int32(i), ids(i)),
    "offload": lambda i: (cache, ids(i, i + 1)),
    "attend": lambda i: (cache, jnp.int32(i), K + i, plan),
    "audit": lambda i: (cache,),
  }
  for name, args in calls.items():
    run = jax.jit(chex.assert_max_traces(getattr(paged_jax, name), n=1))
    for i in range(2):
      run(*args(i))
  chex.clear_trace_counter()


# Transforms.


def story(cache, verbs=paged_jax):
  """Fork, copy on write, a full pool, swap and back: every verb that moves something."""
  cache, a = verbs.extend(cache, ids(6, 0, 3))
  plan = verbs.plan(cache, ids(0, 0, 2), ids(0, 5, 1))
  k = jnp.arange(12, dtype=jnp.float32).reshape(3, 2, 2)
  cache = verbs.write(cache, jnp.int32(1), k, -k, plan)
  cache, b = verbs.fork(cache, ids(0), ids(1))
  cache, c = verbs.extend(cache, ids(1, 9, 24))
  cache, d = verbs.unshare(cache, ids(0, 16, 3))
  cache, image, e = verbs.swap_out(cache, jnp.int32(2))
  cache, f = verbs.reorder(cache, ids(0, 0, 3))
  cache, g = verbs.swap_in(cache, jnp.int32(2), image)
  cache, h = verbs.trim(cache, cache.lengths // 2)
  out = verbs.attend(cache, 1, k, verbs.plan(cache, ids(0, 2, 3), ids(1, 0, 0)))
  return cache, (a, b, c, d, e, f, g, h), image, out


def test_a_program_of_verbs_means_the_same_under_every_transform():
  cache = empty()
  plain = story(empty(), jitted)
  invariants.check(plain[0])
  batch = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
  batched = jax.jit(jax.vmap(story))(batch)

  @jax.jit
  def scan(cache):
    def step(cache, _):
      cache, *rest = story(cache)
      return cache, tuple(rest)

    return jax.lax.scan(step, cache, None, length=1)

  last, scanned = scan(cache)
  chex.assert_trees_all_equal(plain[0].ledger, last.ledger)
  chex.assert_trees_all_close(plain[0], last, rtol=1e-6)
  for many, wanted, n in ((batched, plain, 2), (scanned, plain[1:], 1)):
    for i in range(n):
      chex.assert_trees_all_close(wanted, jax.tree.map(lambda x: x[i], many), rtol=1e-6)  # noqa: B023


def test_caches_of_a_batch_that_need_different_work_do_not_disturb_each_other():
  first, _ = write(extend(empty(), 5, 0, 0)[0], 0, [1, 2, 3, 4, 5])
  first, _ = jitted.fork(first, ids(0), ids(1))
  second, _ = extend(empty(), 2, 23, 4)  # holds all pages, and needs none
  kv = np.arange(second.pages.kv.size, dtype=np.float32).reshape(second.pages.kv.shape)
  second = dataclasses.replace(second, pages=dataclasses.replace(second.pages, kv=jnp.asarray(kv)))
  counts = jnp.array([[1, 1, 9], [1, 0, 0]], jnp.int32)
  both = jax.tree.map(lambda *x: jnp.stack(x), first, second)
  together = jax.jit(jax.vmap(paged_jax.extend))(both, counts)
  alone = [jitted.extend(c, n) for c, n in zip((first, second), counts)]
  chex.assert_trees_all_equal(together, jax.tree.map(lambda *x: jnp.stack(x), *alone))


def test_only_a_page_that_is_copied_is_read():
  cache = empty()
  program = str(jax.make_jaxpr(paged_jax.extend)(cache, ROWS))
  page = (1, *cache.pages.kv.shape[1:])
  assert program.count(f"slice_sizes={page}") == 1


def decode(cache, num_steps):
  """A decode loop as users write it: grow, plan, write and attend in each layer, stop when full."""

  def step(carry):
    cache, alive, made, _ = carry
    cache, info = paged_jax.extend(cache, alive.astype(jnp.int32))
    alive &= info.ok
    rows = jnp.where(alive, ROWS, 3)
    plan = paged_jax.plan(cache, rows, cache.lengths - 1)

    def layer(carry, index):
      cache, x = carry
      cache = paged_jax.write(cache, index, x, -x, plan)
      return (cache, x + paged_jax.attend(cache, index, x, plan)), None

    x = jnp.ones((3, 2, 2)) * cache.lengths.astype(jnp.float32)[:, None, None]
    (cache, x), _ = jax.lax.scan(layer, (cache, x), jnp.arange(2, dtype=jnp.int32))
    return cache, alive, made + alive.astype(jnp.int32), x

  def more(carry):
    return jnp.any(carry[1]) & (jnp.max(carry[2]) < num_steps)

  start = (cache, jnp.ones(3, jnp.bool_), jnp.zeros(3, jnp.int32), jnp.zeros((3, 2, 2)))
  return jax.lax.while_loop(more, step, start)


def test_hundreds_of_steps_across_pages_a_fork_and_a_full_pool_are_one_program():
  cache, _ = write(extend(empty(num_pages=90, max_length=400), 5, 0, 2)[0], 0, [1, 2, 3, 4, 5])
  cache, _ = jitted.fork(cache, ids(0), ids(1))
  assert host_calls(lambda c: decode(c, 300), cache) == set()
  run = jax.jit(lambda c: decode(c, 300), donate_argnums=0)
  cache, alive, made, _ = run(cache)
  # 90 pages of 4: rows 0 and 1 share page 0 and row 2 has its own.
  assert not alive.any() and int(cache.num_free) == 0
  assert made.tolist() == [119, 115, 118]
  assert pages_of(cache, 0)[0] == pages_of(cache, 1)[0]
  assert pages_of(cache, 0)[1] != pages_of(cache, 1)[1]
  np.testing.assert_array_equal(
    jitted.gather(cache, 0, ids(0), num_tokens=5)[0],
    jitted.gather(cache, 0, ids(1), num_tokens=5)[0],
  )
  invariants.check(cache)


def test_a_deliberate_host_call_is_found():
  def peeks(cache):
    jax.debug.callback(lambda x: None, cache.num_free)
    return decode(cache, 2)

  assert host_calls(peeks, paged_jax.init(config())) != set()


def test_a_deliberate_host_read_cannot_be_traced():
  def reads(cache):
    return decode(cache, int(cache.num_free))

  with pytest.raises(jax.errors.ConcretizationTypeError):
    host_calls(reads, paged_jax.init(config()))


# In place.


def abstract(config):
  return jax.eval_shape(lambda: paged_jax.init(config))


BIG = config(num_pages=512, head_dim=16, num_layers=4)
OPERANDS = {
  "extend": (ROWS,),
  "fork": (ROWS, ROWS),
  "reorder": (ROWS,),
  "unshare": (ROWS,),
  "trim": (ROWS,),
  "slide": (ROWS,),
  "free": (ROWS > 0,),
  "hold": (ROWS,),
  "drop": (ROWS,),
  "adopt": (ROWS, ROWS[:, None], ROWS),
  "swap_out": (jnp.int32(0),),
}


def written(cache, k, layer):
  plan = paged_jax.plan(cache, ROWS, ROWS)
  return paged_jax.write(cache, layer, k, k, plan)


def swapped(cache, row):
  cache, image, _ = paged_jax.swap_out(cache, row)
  return paged_jax.swap_in(cache, row, image)


def keys_written(cache, k):
  plan = paged_jax.plan(cache, ROWS, ROWS)
  return paged_jax.write(cache, 1, k, None, plan)


def restored(cache, value, count):
  image = jax.tree.map(lambda x: jnp.full(x.shape[1:], value).astype(x.dtype), cache.pages)
  return paged_jax.restore(cache, (image, image), count)


CALLS = {name: (getattr(paged_jax, name), args) for name, args in OPERANDS.items()}
CALLS["write"] = (written, (jnp.zeros((3, 2, 16)), jnp.int32(1)))
CALLS["write keys"] = (keys_written, (jnp.zeros((3, 2, 32)),))
CALLS["swap"] = (swapped, (jnp.int32(0),))
CALLS["restore"] = (restored, (jnp.float32(0), jnp.int32(2)))
CALLS["scrub"] = (paged_jax.scrub, (ROWS,))


LEDGER_ONLY = ("fork", "reorder", "trim", "slide", "free", "hold", "drop", "adopt")
# Under vmap, where a `cond` copies what it carries, all verbs; alone those that move bytes, two of
# them in the way that 16 bits are stored.
IN_PLACE = [(name, "float32", True) for name in CALLS]
IN_PLACE += [
  (name, dtype, False)
  for name in CALLS
  if name not in LEDGER_ONLY
  for dtype in ("bfloat16" if name in ("extend", "write") else "float32", "int8", "float8_e4m3fn")
]
IN_PLACE += [("write", "int8", True)]


@pytest.mark.parametrize(("name", "dtype", "batched"), IN_PLACE)
def test_no_verb_copies_the_pool(name, dtype, batched):
  verb, args = CALLS[name]
  keys = dict(head_dim=32, value_dim=16) if name == "write keys" else {}
  cache = abstract(dataclasses.replace(BIG, dtype=dtype, **keys))
  if batched:
    cache, *args = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), (cache, *args)
    )
    verb = jax.vmap(verb)
  assert_in_place(verb, cache, *args)


def test_a_decode_loop_does_not_copy_the_pool():
  cache = abstract(dataclasses.replace(BIG, head_dim=2, num_layers=2))
  assert_in_place(functools.partial(decode, num_steps=8), cache)


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
def test_attention_over_rows_of_one_token_and_of_many_does_not_copy_the_pool(batched):
  def mixed(cache, rows, positions):
    plan = paged_jax.plan(cache, rows, positions, implementation="xla")
    assert plan.parts[0].block_size > 1

    def layer(carry, index):
      cache, x = carry
      cache = paged_jax.write(cache, index, x, -x, plan)
      return (cache, x + paged_jax.attend(cache, index, x, plan)), None

    return jax.lax.scan(layer, (cache, jnp.ones((24, 2, 16))), jnp.arange(4, dtype=jnp.int32))[0]

  args = (abstract(BIG), *[jax.ShapeDtypeStruct((24,), jnp.int32)] * 2)
  if batched:
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), args)
    mixed = jax.vmap(mixed)
  assert_in_place(mixed, *args)


def test_a_copy_of_the_pool_is_caught():
  def careless(cache, num_tokens):
    after, info = paged_jax.extend(cache, num_tokens)
    return after, info, cache.pages.kv[0] + after.pages.kv[0], jnp.sort(cache.pages.kv, axis=0)[0]

  cache = abstract(BIG)
  with pytest.raises(AssertionError, match="not in place"):
    assert_in_place(careless, cache, ROWS)


# Persistence.


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_cache_survives_a_checkpoint(tmp_path, dtype):
  cache, _ = write(extend(empty(dtype=dtype), 5, 0, 0)[0], 0, [1, 2, 3, 4, 5])
  cache, _ = jitted.fork(cache, ids(0), ids(1))
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "cache", cache)
    saver.wait_until_finished()
    restored = saver.restore(tmp_path / "cache", jax.eval_shape(lambda: cache))
  chex.assert_trees_all_equal(restored, cache)
  (restored, ok), (cache, _) = (extend(each, 1, 1, 1) for each in (restored, cache))
  assert ok == [True] * 3
  chex.assert_trees_all_equal(*(jitted.gather(each, 1, ids(1)) for each in (restored, cache)))
  assert isinstance(restored, paged_jax.Cache)


def test_poisoned_free_pages_never_show():
  cache = replay.poison(empty())
  cache, _ = extend(cache, 5, 0, 0)
  assert read(cache, 0) == [0] * 5


Q, KEYS, VALUES = np.random.default_rng(0).standard_normal((3, 6, 2, 5), np.float32)


@functools.partial(jax.jit, static_argnames="implementation")
def seen(cache, v, implementation):
  """All that a caller sees of keys and values through writes, a copy and a swap; and the cache."""
  rows, positions = ids(0, 0, 0, 0, 0, 2), ids(0, 1, 2, 3, 4, 0)
  cache, _ = paged_jax.extend(replay.poison(cache), ids(5, 0, 1))
  plan = paged_jax.plan(cache, rows, positions, implementation=implementation)
  cache = paged_jax.write(cache, 1, KEYS, v, plan)
  out, lse = paged_jax.attend(cache, 1, Q, plan, return_lse=True)
  cache, _ = paged_jax.fork(cache, ids(0), ids(1))
  cache, _ = paged_jax.extend(cache, ids(1, 0, 0))  # copies the shared page
  cache, image, _ = paged_jax.swap_out(cache, ids(0)[0])
  cache, info = paged_jax.swap_in(cache, ids(0)[0], image)
  return cache, (out, lse, *paged_jax.gather(cache, 1, ROWS), info)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padded_storage_changes_no_bit_that_a_caller_sees(implementation):
  _, plain = seen(jitted.init(config(head_dim=5)), VALUES, implementation)
  cache = jitted.init(config(head_dim=5, storage_head_dim=16))
  cache, padded = seen(cache, VALUES, implementation)
  assert cache.pages.kv.shape[-1] == 32 and padded[0].shape == Q.shape
  chex.assert_trees_all_equal(padded, plain)
  kv = np.asarray(cache.pages.kv[cache.block_tables[:, 0]]).reshape(3, 2, 2, 4, 2, 16)
  assert (kv[..., 5:] == 0).all() and (kv[0, 1, :, :, :, :5] != 0).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("stored", [None, 8])
def test_values_that_are_channels_of_keys_are_stored_once_and_seen_as_if_apart(
  implementation, stored
):
  _, (out, lse, k, v, info) = seen(jitted.init(config(head_dim=5)), KEYS, implementation)
  small = config(head_dim=5, storage_head_dim=stored, value_dim=3)
  cache, got = seen(jitted.init(small), None, implementation)
  assert cache.pages.kv.shape[-1] == (stored or 5)
  assert cache.pages.kv.nbytes == small.page_bytes * small.num_pages
  np.testing.assert_allclose(got[0], out[..., :3], rtol=1e-6, atol=1e-6)
  chex.assert_trees_all_equal(got[1:], (lse, k, v[..., :3], info))


def random_bytes(dtype):
  """A cache of two rows, 9 and 4 tokens, whose pages hold any bits, NaN too; and its arrays."""
  cache, _ = extend(jitted.init(config(dtype=dtype)), 9, 0, 4)
  rng = np.random.default_rng(0)

  def any_bits(x):
    return rng.integers(0, 256, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape)

  pages = jax.tree.map(any_bits, cache.pages)
  return dataclasses.replace(cache, pages=jax.tree.map(jnp.asarray, pages)), arrays(pages)


def arrays(pages):
  """Numbers, and scales if there are any."""
  return [np.asarray(x) for x in jax.tree.leaves(pages)]


def bits(pages, *places):
  """What each array has in a place."""
  return [x[places].tobytes() for x in arrays(pages)]


DTYPES = pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]
)


@DTYPES
def test_offloaded_pages_come_back_bit_for_bit_whatever_they_hold(dtype):
  cache, before = random_bytes(dtype)
  images = jitted.offload(cache, ids(2, 0, 99, -1))
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(images)}
  assert kinds == {"pinned_host"}
  assert not any(x.any() for image in images[2:] for x in arrays(image))
  cache, pages, info = jitted.restore(cache, images, jnp.int32(3))
  assert bool(info.ok) and int(info.num_free) == 1 and pages.tolist() == [4, 5, 6, 8]
  assert cache.ledger.pool.holds.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
  for taken, source in ((4, 2), (5, 0)):
    assert bits(cache.pages, taken) == bits(before, source)
  assert not any(x[6].any() for x in arrays(cache.pages))
  assert bits(cache.pages, [0, 1, 2, 3, 7]) == bits(before, [0, 1, 2, 3, 7])
  invariants.check(cache)


@DTYPES
def test_a_swapped_row_comes_back_bit_for_bit_and_its_image_holds_nothing_else(dtype):
  cache, before = random_bytes(dtype)
  cache, image, _ = jitted.swap_out(cache, jnp.int32(0))
  assert (int(image.start), int(image.length), image.pages.kv.shape[0]) == (0, 9, 6)
  image_bits, everything = arrays(image.pages), slice(None)
  assert bits(image_bits, slice(2)) == bits(before, slice(2))
  one = 2, everything, everything, 0  # one token in the third page
  assert bits(image_bits, *one) == bits(before, *one)
  assert not any(x[2, :, :, 1:].any() or x[3:].any() for x in image_bits)
  cache, info = jitted.swap_in(cache, jnp.int32(1), image)
  assert bool(info.ok) and pages_of(cache, 1) == [4, 5, 6]
  assert bits(cache.pages, slice(4, 7)) == bits(image_bits, slice(3))
  assert bits(cache.pages, 3) == bits(before, 3)
  assert not cache.ledger.pool.holds.any()
  invariants.check(cache)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("value_dim", [None, 3])
def test_a_key_or_value_of_8_bits_that_is_not_finite_reads_nan_in_its_head_and_row_alone(
  dtype, worst, value_dim
):
  config_ = config(head_dim=5, dtype=dtype, value_dim=value_dim)
  k = KEYS.copy()
  k[2, 1, 3] = worst  # token 2 of row 0, head 1
  v = None if value_dim else VALUES
  rows, positions = ids(0, 0, 0, 0, 1, 1), ids(0, 1, 2, 3, 0, 1)
  cache, _ = extend(jitted.init(config_), 4, 2, 0)
  plan = jitted.plan(cache, rows, positions)
  cache = jitted.write(cache, 1, k, v, plan)
  got, _ = jitted.gather(cache, 1, ROWS, num_tokens=4)
  bad = np.zeros((3, 4, 2), bool)
  bad[0, 2, 1] = True
  np.testing.assert_array_equal(np.isnan(got), np.broadcast_to(bad[..., None], got.shape))
  out = np.asarray(jitted.attend(cache, 1, Q, plan))
  assert np.isnan(out[2:4, 1]).all()  # those that see it
  assert np.isfinite(out[:, 0]).all() and np.isfinite(out[4:]).all()  # the other head and row


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_zero_tiny_and_huge_channels_are_kept_as_their_scale_allows(dtype):
  k = np.zeros((4, 2, 5), np.float32)
  k[1] = 1e-42  # a denormal
  k[2, :, 0], k[2, :, 1:] = 1e4, 1.0  # one channel far above the others
  k[3] = np.finfo(np.float32).max
  cache, _ = extend(jitted.init(config(head_dim=5, dtype=dtype)), 4, 0, 0)
  plan = jitted.plan(cache, ids(0, 0, 0, 0), ids(0, 1, 2, 3))
  cache = jitted.write(cache, 0, k, -k, plan)
  got_k, got_v = jitted.gather(cache, 0, ids(0), num_tokens=6)
  np.testing.assert_array_equal(got_v, -got_k)
  got = np.asarray(got_k[0])
  assert not got[:2].any() and not got[4:].any()
  np.testing.assert_allclose(got[2, :, 0], 1e4, rtol=1e-6)
  small = 0.0 if dtype == "int8" else 1.0  # int8 has steps of 1e4 / 127, e4m3 of a part of itself
  np.testing.assert_allclose(got[2, :, 1:], small, rtol=0.07)
  np.testing.assert_allclose(got[3], k[3], rtol=1e-6)


def test_a_restore_that_does_not_fit_changes_nothing():
  cache, _ = extend(empty(), 24, 0, 4)
  images = jitted.offload(cache, ids(0, 1))
  before = jax.tree.map(np.asarray, cache)
  for count in (2, -1, 3):
    cache, pages, info = jitted.restore(cache, images, jnp.int32(count))
    assert not bool(info.ok) and pages.tolist() == [8, 8]
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, cache), before)


def test_scrub_clears_free_pages_and_no_others():
  cache, _ = extend(empty(), 4, 4, 0)
  cache, _ = write(cache, 0, [1, 2, 3, 4])
  cache, _ = write(cache, 1, [5, 6, 7, 8])
  cache, _ = jitted.free(cache, jnp.array([True, False, False]))
  cache = jitted.scrub(cache, ids(0, 1, 8, -1))
  assert not np.asarray(cache.pages.kv[0]).any()
  assert read(cache, 1) == [5, 6, 7, 8]
