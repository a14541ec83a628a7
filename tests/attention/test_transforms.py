import dataclasses
from functools import partial

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from paged_jax import attention
from paged_jax.types import Pages, Tables

MIXED = cases.Case("", (40, 9, 12), (5, 1, 3), num_heads=16, num_kv_heads=8)
every_implementation = pytest.mark.parametrize("implementation", ("reference", "xla"))


def problem(implementation, seed=0, case=MIXED):
  p = cases.build(case, seed)
  plan = cases.plan(p.plan.rows, p.plan.positions, p.pages, p.tables, implementation=implementation)
  return dataclasses.replace(p, plan=plan)


def attend(p, **changes):
  p = dataclasses.replace(p, **changes)
  return jitted(p.q, p.pages, p.layer, p.tables, p.plan)


jitted = jax.jit(attention.attend)


def equal(got, want):
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


@every_implementation
def test_vmap_over_caches_equals_one_at_a_time(implementation):
  many = [problem(implementation, seed) for seed in range(3)]
  args = [(p.q, p.pages, p.layer, p.tables, p.plan) for p in many]
  out, lse = jax.jit(jax.vmap(attention.attend))(*jax.tree.map(lambda *x: np.stack(x), *args))
  for i, p in enumerate(many):
    equal((out[i], lse[i]), attend(p))


@every_implementation
def test_scan_over_layers_carries_the_pages(implementation):
  p = problem(implementation)
  want, _ = attend(p)

  @jax.jit
  def run(pages):
    def layer(pages, index):
      out, _ = attend(p, pages=pages, layer=index)
      return pages, out

    return jax.lax.scan(layer, pages, jnp.arange(2))[1]

  np.testing.assert_allclose(run(p.pages)[1], want, rtol=1e-5, atol=1e-6)


@every_implementation
def test_one_trace_serves_all_ids_and_lengths(implementation):
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(q, pages, tables, plan, layer, window, scale):
    return attention.attend(q, pages, layer, tables, plan, window=window, scale=scale)

  p = problem(implementation)
  for seed in range(3):
    shuffled = dataclasses.replace(p.tables, starts=p.tables.starts + seed,
                                   block_tables=p.tables.block_tables[:, ::-1])  # fmt: skip
    run(p.q, p.pages, shuffled, p.plan, jnp.int32(seed % 2), jnp.int32(3 + seed), jnp.float32(seed))


@every_implementation
def test_shard_map_over_heads_needs_no_collective(implementation):
  p = problem(implementation)
  mesh = jax.make_mesh((8,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
  kv, heads = P(None, None, "h"), P(None, "h")
  run = jax.jit(
    jax.shard_map(
      lambda q, kv: attend(p, q=q, pages=dataclasses.replace(p.pages, kv=kv)),
      mesh=mesh,
      in_specs=(heads, kv),
      out_specs=(heads, heads),
    )
  )
  equal(run(p.q, p.pages.kv), attend(p))
  program = run.lower(p.q, p.pages.kv).compile().as_text()
  assert not any(op in program for op in ("all-reduce", "all-gather", "all-to-all", "permute("))


def long_rows(num_rows, pages_per_row, lengths, num_pages=4):
  """Rows of any length on few pages, shared by everybody: attention only reads."""
  tables = jnp.arange(num_rows * pages_per_row, dtype=jnp.int32).reshape(num_rows, -1) % num_pages
  lengths = jnp.asarray(lengths, jnp.int32)
  pages = Pages(jnp.ones((num_pages, 1, 4, 16, 128)), np.dtype("float32"), 64)
  tables = Tables(tables, jnp.zeros_like(lengths), lengths, jnp.zeros(num_rows, bool))
  plan = cases.plan(jnp.arange(num_rows), lengths - 1, pages, tables, implementation="xla")
  return jnp.ones((num_rows, 4, 64)), pages, 0, tables, plan


def temp_bytes(*args, **options):
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype), args)
  run = jax.jit(partial(attention.attend, **options))
  return run.lower(*abstract).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_neither_with_the_context_nor_with_the_pool():
  small = temp_bytes(*long_rows(4, 64, [1024] * 4))
  assert temp_bytes(*long_rows(4, 4096, [65536] * 4)) == small
  assert temp_bytes(*long_rows(4, 64, [1024] * 4, num_pages=4096)) == small
