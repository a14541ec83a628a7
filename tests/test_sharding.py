"""Verbs on a cache whose KV heads are split over eight virtual devices."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from story import config, ids

import paged_jax
from paged_jax import jitted
from paged_jax.sharding import shardings, specs, split
from paged_jax.testing import assert_in_place

HEADS = config(num_kv_heads=8, num_rows=3)
REQUIRED_DEVICES = 8
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def mesh(kind, shape=(8,), names=("model",)):
  assert len(jax.devices()) >= REQUIRED_DEVICES, "tests/conftest.py asks for eight CPU devices"
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def mesh_of(ways):
  return jax.sharding.Mesh(np.array(jax.devices()[:ways]), ("model",))


def step(cache, q, k, **options):
  """A decode step with a fork before it and a swap behind it."""
  cache, _ = paged_jax.extend(cache, ids(5, 0, 3))
  cache, _ = paged_jax.fork(cache, ids(0), ids(1))
  cache, info = paged_jax.extend(cache, ids(1, 1, 1))
  plan = paged_jax.plan(cache, ids(0, 1, 2), cache.lengths - 1)
  for layer in range(2):
    cache = paged_jax.write(cache, layer, k + layer, k - layer, plan)
  out = paged_jax.attend(cache, 1, q, plan, **options)
  cache, image, _ = paged_jax.swap_out(cache, jnp.int32(1))
  cache, _ = paged_jax.swap_in(cache, jnp.int32(1), image)
  return cache, out, info


def operands():
  q = jax.random.normal(jax.random.key(0), (3, 16, 2))
  k = jax.random.normal(jax.random.key(1), (3, 8, 2))
  return q, k


@pytest.fixture(scope="module")
def alone():
  return jax.jit(step)(jitted.init(HEADS), *operands())


def check(got, alone):
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got[0]), jax.tree.map(np.asarray, alone[0]))
  np.testing.assert_allclose(np.asarray(got[1]), np.asarray(alone[1]), rtol=1e-6, atol=1e-6)


def test_plain_jit_splits_heads_without_collectives(alone):
  where = mesh(AxisType.Auto)
  split = NamedSharding(where, PartitionSpec(None, "model"))
  cache = jax.device_put(jitted.init(HEADS), shardings(HEADS, where))
  q, k = (jax.device_put(x, split) for x in operands())
  out = (shardings(HEADS, where), split, None)
  compiled = jax.jit(step, donate_argnums=0, out_shardings=out).lower(cache, q, k).compile()
  assert not re.search(COLLECTIVES, compiled.as_text())
  got = compiled(cache, q, k)
  assert got[0].pages.kv.sharding.spec == PartitionSpec(None, None, "model", None, None)
  check(got, alone)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shard_map_runs_the_same_program_on_every_part_of_the_heads(alone, kind):
  where = mesh(kind)
  spec = specs(HEADS, where)
  heads = PartitionSpec(None, "model")
  run = jax.shard_map(
    step,
    mesh=where,
    in_specs=(spec, heads, heads),
    out_specs=(spec, heads, PartitionSpec()),
    check_vma=False,
  )
  cache = jax.device_put(jitted.init(HEADS), shardings(HEADS, where))
  q, k = (jax.device_put(x, NamedSharding(where, heads)) for x in operands())
  compiled = jax.jit(run, donate_argnums=0).lower(cache, q, k).compile()
  assert not re.search(COLLECTIVES, compiled.as_text())
  check(compiled(cache, q, k), alone)


def test_plain_jit_with_explicit_axes(alone):
  where = mesh(AxisType.Explicit)
  with jax.set_mesh(where):
    cache = jax.device_put(jitted.init(HEADS), shardings(HEADS, where))
    q, k = (jax.device_put(x, PartitionSpec(None, "model")) for x in operands())
    run = jax.jit(step, donate_argnums=0)
    compiled = run.lower(cache, q, k).compile()
    assert not re.search(COLLECTIVES, compiled.as_text())
    check(compiled(cache, q, k), alone)


@pytest.mark.once
def test_pages_of_keys_alone_split_their_heads_too():
  where, keys = mesh(AxisType.Auto), dataclasses.replace(HEADS, value_dim=1)
  q, k = operands()

  def attended(cache, q, k):
    cache, _ = paged_jax.extend(cache, ids(5, 0, 3))
    plan = paged_jax.plan(cache, ids(0, 1, 2), cache.lengths - 1)
    cache = paged_jax.write(cache, 1, k, None, plan)
    return paged_jax.attend(cache, 1, q, plan)

  want = jax.jit(attended)(jitted.init(keys), q, k)
  cache = jax.device_put(jitted.init(keys), shardings(keys, where))
  args = jax.device_put((q, k), NamedSharding(where, PartitionSpec(None, "model")))
  compiled = jax.jit(attended).lower(cache, *args).compile()
  assert not re.search(COLLECTIVES, compiled.as_text())
  np.testing.assert_allclose(compiled(cache, *args), want, rtol=1e-6, atol=1e-6)
  assert want.shape == (3, 16, 1)


def test_a_second_mesh_axis_stays_replicated():
  where = mesh(AxisType.Auto, (2, 4), ("data", "model"))
  init = functools.partial(jax.jit, static_argnums=0, out_shardings=shardings(HEADS, where))
  cache = init(paged_jax.init)(HEADS)
  assert cache.pages.kv.sharding.shard_shape(cache.pages.kv.shape)[2] == 2
  assert shardings(HEADS, where, axis="data").pages.kv.spec[2] == "data"


def test_heads_that_do_not_divide_are_replicated_with_a_warning():
  three = config(num_kv_heads=3)
  with pytest.warns(UserWarning, match="3 KV heads do not divide over 8 devices"):
    where = shardings(three, mesh(AxisType.Auto))
  assert where.pages.kv.is_fully_replicated


def test_an_unknown_axis_is_named():
  with pytest.raises(ValueError, match=r"axis.*'heads'"):
    shardings(HEADS, mesh(AxisType.Auto), axis="heads")


def test_each_cache_of_a_tuple_is_split_by_its_own_heads():
  sizes = dict(num_layers=1, head_dim=4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  configs = tuple(paged_jax.CacheConfig(num_kv_heads=heads, **sizes) for heads in (8, 3))
  with pytest.warns(UserWarning, match="3 KV heads do not divide"):
    split, whole = specs(configs, mesh(AxisType.Auto))
  assert (split.pages.kv[2], whole.pages.kv[2]) == ("model", None)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_8_bit_pages_and_answers_are_equal_bit_for_bit_on_1_2_and_4_devices(dtype):
  small = dataclasses.replace(HEADS, dtype=dtype)

  def on(ways):
    where = mesh_of(ways)
    split = NamedSharding(where, PartitionSpec(None, "model"))
    cache = jax.device_put(jitted.init(small), shardings(small, where))
    args = (cache, *jax.device_put(operands(), split))
    compiled = (
      jax.jit(step, out_shardings=(shardings(small, where), split, None)).lower(*args).compile()
    )
    assert ways == 1 or not re.search(COLLECTIVES, compiled.as_text())
    cache, out, info = compiled(*args)
    assert cache.pages.scales.sharding.spec[2] == "model"
    return jax.tree.map(np.asarray, (cache, out, info))

  one = on(1)
  assert one[0].pages.kv.any() and one[0].pages.scales.any() and one[1].any()
  for ways in (2, 4):
    chex.assert_trees_all_equal(on(ways), one)


# Split caches: the verbs see to the mesh.


def four(kind=AxisType.Auto):
  return jax.make_mesh((4,), ("model",), axis_types=(kind,), devices=jax.devices()[:4])


def with_sinks(cache, q, k):
  return step(cache, q, k, sinks=jnp.arange(q.shape[1], dtype=jnp.float32), softcap=5.0)


@pytest.mark.parametrize(
  ("heads", "kept", "kind", "dtype"),
  [
    (8, 8, AxisType.Auto, "float32"),
    (2, 4, AxisType.Explicit, "float32"),
    (1, 4, AxisType.Auto, "int8"),
    (3, 12, AxisType.Auto, "float32"),
    (8, 8, AxisType.Explicit, "int8"),
    (1, 4, AxisType.Explicit, "float32"),
  ],
)
def test_a_split_cache_gives_the_same_bits_without_collectives(heads, kept, kind, dtype):
  whole = config(num_kv_heads=heads, dtype=dtype)
  q = jax.random.normal(jax.random.key(0), (3, 24 if heads == 3 else 16, 2))
  k = jax.random.normal(jax.random.key(1), (3, heads, 2))
  want = jax.jit(with_sinks)(jitted.init(whole), q, k)
  small = split(whole, where := four(kind))
  cache = paged_jax.init(small)
  assert cache.pages.kv.shape[2] == small.array_kv_heads == kept
  args = jax.device_put((q, k), NamedSharding(where, PartitionSpec()))
  compiled = jax.jit(with_sinks, donate_argnums=0).lower(cache, *args).compile()
  assert not re.search(COLLECTIVES, compiled.as_text())
  cache, out, info = compiled(cache, *args)
  np.testing.assert_array_equal(out, want[1])
  chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, x) for x in (info, want[2])))
  chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, x.ledger) for x in (cache, want[0])))
  both = (jitted.gather(x, 1, ids(0, 1, 2)) for x in (cache, want[0]))
  chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, x) for x in both))
  assert cache.pages.kv.sharding.spec[2] == "model"


@pytest.mark.parametrize("heads", [8, 2, 1])
def test_each_device_has_its_part_of_the_pages_and_no_more(heads):
  whole = config(num_kv_heads=heads, dtype="int8")
  small = split(whole, four())
  pages = paged_jax.init(small).pages
  ideal = whole.page_bytes // heads * -(-heads // 4) * whole.num_pages
  for device in range(4):
    parts = (x.addressable_shards[device].data.nbytes for x in jax.tree.leaves(pages))
    assert sum(parts) == ideal == small.page_bytes * small.num_pages // 4


def decoded(cache, k):
  cache, _ = paged_jax.fork(cache, ids(0), ids(1))
  cache, _ = paged_jax.extend(cache, ids(1, 1, 1))
  plan = paged_jax.plan(cache, ids(0, 1, 2), cache.lengths - 1)
  cache = paged_jax.write(cache, 1, k, k, plan)
  return cache, paged_jax.attend(cache, 1, k, plan)


def swapped(cache, k):
  del k
  cache, image, _ = paged_jax.swap_out(cache, jnp.int32(1))
  return paged_jax.swap_in(cache, jnp.int32(1), image)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("run", [decoded, swapped])
def test_no_verb_copies_the_part_of_a_device(run, dtype):
  small = split(config(num_kv_heads=8, num_pages=512, head_dim=16, dtype=dtype), four())
  assert_in_place(run, paged_jax.init(small), jax.ShapeDtypeStruct((3, 8, 16), jnp.float32))


def test_how_often_heads_are_kept_follows_from_their_number():
  small = split(config(num_kv_heads=1), four())
  assert small.array_kv_heads == 4
  assert dataclasses.replace(small, num_kv_heads=8).array_kv_heads == 8
  assert dataclasses.replace(small, num_kv_heads=2).array_kv_heads == 4
  assert shardings(small, four()).pages.kv.spec[2] == "model"


@pytest.mark.parametrize("heads", [8, 4])
def test_bytes_of_one_device_come_into_a_split_cache_and_back(heads):
  whole = config(num_kv_heads=heads)
  k = jax.random.normal(jax.random.key(0), (3, heads, 2))

  def filled(cache):
    cache, _ = jitted.extend(cache, ids(3, 0, 0))
    plan = jitted.plan(cache, ids(0, 0, 0), ids(0, 1, 2))
    return jitted.write(cache, 1, k, -k, plan)

  one, parts = filled(jitted.init(whole)), filled(paged_jax.init(split(whole, four())))
  for source, target in ((one, split(whole, four())), (parts, whole)):
    source, image, _ = jitted.swap_out(source, jnp.int32(0))
    where = jax.tree.leaves(paged_jax.init(target))[0].sharding  # of the ledger
    image = jax.device_put(jax.tree.map(np.asarray, image), where)
    cache, info = jitted.swap_in(paged_jax.init(target), jnp.int32(1), image)
    assert bool(info.ok)
    got, _ = jitted.gather(cache, 1, ids(1), num_tokens=3)
    np.testing.assert_array_equal(got[0], k)


def test_a_group_of_caches_is_split_and_a_wrong_mesh_is_named():
  both = (config(num_kv_heads=8), config(num_kv_heads=1, value_dim=1))
  first, second = split(both, four())
  assert (first.split.repeats, second.split.repeats) == (1, 4)
  assert paged_jax.init((first, second))[1].pages.kv.shape[2] == 4
  with pytest.raises(ValueError, match=r"axis must be one of \['model'\], got 'data'"):
    split(both, four(), axis="data")
  with pytest.raises(ValueError, match=r"split must be None or made by `sharding\.split`, got 4"):
    config(split=4)


# Replicas: independent pools on a leading axis, one program.


def test_replicas_run_as_one_program_without_collectives_and_as_each_would_alone():
  where = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  small, parts = config(num_kv_heads=2), PartitionSpec("data")
  caches = jax.vmap(lambda _: paged_jax.init(small))(jnp.arange(8))
  counts = ids(*range(8))[:, None] + ids(0, 1, 4)[None]
  k = jax.random.normal(jax.random.key(0), (8, 3, 2, 2))

  def one(cache, counts, k):
    cache, info = paged_jax.extend(cache, counts)
    plan = paged_jax.plan(cache, ids(0, 1, 2), cache.lengths - 1)
    cache = paged_jax.write(cache, 0, k, -k, plan)
    return cache, paged_jax.attend(cache, 0, k, plan), info

  run = jax.shard_map(jax.vmap(one), mesh=where, in_specs=parts, out_specs=parts, check_vma=False)
  args = jax.device_put((caches, counts, k), NamedSharding(where, parts))
  compiled = jax.jit(run, donate_argnums=0).lower(*args).compile()
  assert not re.search(COLLECTIVES, compiled.as_text())
  got, alone = compiled(*args), jax.jit(one)
  for i in range(8):
    want = alone(jitted.init(small), counts[i], k[i])
    mine = jax.tree.map(lambda x, i=i: x[i], got)
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, x) for x in (mine, want)))


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_orbax_brings_a_cache_back_on_another_mesh_bit_for_bit(dtype, tmp_path):
  """docs/persistence.md shows it."""
  import orbax.checkpoint as ocp

  small = dataclasses.replace(HEADS, dtype=dtype)
  cache, _ = jitted.extend(jitted.init(small), ids(5, 0, 3))
  plan = jitted.plan(cache, ids(0, 2), cache.lengths[np.array([0, 2])] - 1)
  cache = jitted.write(cache, 1, *(x[:2] for x in operands()[1:] * 2), plan)
  want = jax.tree.map(np.asarray, cache)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "cache", jax.device_put(cache, shardings(small, mesh_of(4))))
    checkpointer.wait_until_finished()
    for ways in (2, 1):
      where = shardings(small, mesh_of(ways))
      like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), cache, where
      )
      back = checkpointer.restore(tmp_path / "cache", like)
      assert len(back.pages.kv.sharding.device_set) == ways
      chex.assert_trees_all_equal(jax.tree.map(np.asarray, back), want)
      back, info = jitted.extend(back, ids(1, 1, 1))  # it goes on as the one that was saved
      assert info.ok.all() and back.lengths.tolist() == [6, 1, 4]
