"""The TPU kernels interpreted: on the same cases, to the same tolerance, as every backend."""

import functools
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import paged_jax
from paged_jax import jitted
from paged_jax import pages as pages_lib
from paged_jax.attention import tpu, tpu_write
from paged_jax.types import Pages

# what another case covers, too, on this backend; run by the sweep
COVERED = ("prefill of two rows", "chunked prefill", "heads MHA", "head dim 5", "page size 8",
           "window 1", "window traced, none", "scale", "softcap")  # fmt: skip
SERVED = [
  pytest.param(c, marks=pytest.mark.sweep if c.name in COVERED else ())
  for c in cases.CASES
  if not c.bits and c.dtype != "float16"
]
# of every kind one, small: the interpreter that knows of races and uninitialised memory is slow
STRICT = ("decode", "mixed", "empty rows", "tokens refused", "window and start", "everything",
          "parts, drafts and a prompt, idle rows", "bfloat16, page size 1")  # fmt: skip
races = functools.partial(
  pltpu.InterpretParams, detect_races=True, uninitialized_memory="nan", random_seed=0
)


def in_dma_modes(names, in_both):
  """A copy runs when it is waited for; for the cases `in_both`, also as soon as it starts."""
  pairs = [(name, "on_wait") for name in names] + [(name, "eager") for name in in_both]
  return pytest.mark.parametrize(("name", "mode"), pairs)


def races_found() -> bool:
  """Whether the last run had a race; newer versions raise by themselves."""
  return getattr(interpret_pallas_call.races, "races_found", False)


@pytest.fixture
def interpreted(monkeypatch):
  """Lets the backend "tpu" run interpreted."""

  def use(interpret):
    attend, write = (functools.partial(f, interpret=interpret) for f in (tpu.attend, tpu.write))
    monkeypatch.setattr(tpu, "BACKEND", tpu.BACKEND._replace(attend=attend, write=write))
    cases.forget(keep=f"tpu {interpret}")

  return use


def check(case):
  problem = cases.build(case)
  out, lse = problem.attend("tpu")
  for got, want in zip((out, lse), cases.dense(case, problem)):
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(want, np.float32), case.tolerance,
      case.tolerance,
    )  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_the_kernel_equals_the_definition_in_float64(case, interpreted):
  interpreted(True)
  check(case)


@in_dma_modes(STRICT, ("mixed", "window and start", "everything"))
def test_no_copy_races_and_nothing_uninitialised_is_used(name, mode, interpreted):
  interpreted(races(dma_execution_mode=mode))
  check(next(c for c in cases.CASES if c.name == name))
  assert not races_found()


class Writes(NamedTuple):
  """Rows' tokens written at once, and what the page array must then hold."""

  pages: Pages
  slots: jax.Array
  k: jax.Array
  v: jax.Array


def writes(counts, positions, *, page_size, dtype="float32", padding=0, h=2, d=4, seed=0) -> Writes:
  """`counts[r]` tokens of row r from `positions[r]` on, its pages anywhere; padding between rows."""
  rng = np.random.default_rng(seed)
  per_row = max(-(-(p + c) // page_size) for p, c in zip(positions, counts))
  n = per_row * len(counts) + 1
  tables = rng.permutation(n)[: n - 1].reshape(len(counts), per_row)
  slots = []
  for table, count, position in zip(tables, counts, positions):
    at = np.arange(position, position + count)
    slots += [n * page_size + len(slots) + i for i in range(padding)]
    slots += (table[at // page_size] * page_size + at % page_size).tolist()
  kv = rng.standard_normal((n, 2, h, page_size, 2 * d)).astype(dtype)
  k, v = rng.standard_normal((2, len(slots), h, d)).astype(dtype)
  slots = jnp.array(slots, jnp.int32)
  return Writes(Pages(jnp.array(kv), np.dtype(dtype)), slots, jnp.array(k), jnp.array(v))


WRITES = {
  "decode": dict(counts=(1, 1, 1), positions=(4, 0, 11), page_size=4),
  "decode, more rows than slots of the ring": dict(
    counts=(1,) * 70, positions=tuple(range(70)), page_size=16
  ),
  "one token": dict(counts=(1,), positions=(3,), page_size=4),
  "several tokens per row": dict(counts=(3, 4, 2), positions=(1, 6, 3), page_size=4),
  "prefill across pages and windows": dict(counts=(45, 20), positions=(0, 13), page_size=32),
  "padding": dict(counts=(5, 1), positions=(2, 7), page_size=4, padding=3),
  "nothing but padding": dict(counts=(0,), positions=(1,), page_size=4, padding=3),
  "page size 1": dict(counts=(3, 2), positions=(0, 5), page_size=1),
  "odd page size": dict(counts=(7, 2), positions=(1, 2), page_size=3),
  "bfloat16": dict(counts=(1, 1, 6), positions=(4, 1, 13), page_size=4, dtype="bfloat16"),
  "bfloat16 prefill": dict(counts=(45, 20), positions=(3, 13), page_size=32, dtype="bfloat16"),
}
SHORT = ("decode", "decode, more rows than slots of the ring", "several tokens per row",
         "page size 1", "bfloat16")  # fmt: skip
LONG = ("prefill across pages and windows", "padding", "nothing but padding", "odd page size",
        "bfloat16 prefill")  # fmt: skip
BLOCKS = [(name, 4) for name in WRITES] + [(n, 1) for n in SHORT] + [(n, 64) for n in LONG]


def check_write(w: Writes, block_size, interpret):
  write = functools.partial(tpu_write.write, block_size=block_size, interpret=interpret)
  got = jax.jit(write, compiler_options=cases.INTERPRETER)(w.pages, jnp.int32(1), w.k, w.v, w.slots)
  want = scatter(w.pages, jnp.int32(1), w.k, w.v, w.slots)
  np.testing.assert_array_equal(got.kv, want.kv)


scatter = jax.jit(pages_lib.write)


@pytest.mark.parametrize(("name", "block_size"), BLOCKS)
def test_the_write_equals_a_scatter_bit_by_bit(name, block_size):
  check_write(writes(**WRITES[name]), block_size, True)


@in_dma_modes(WRITES, ("decode, more rows than slots of the ring", "padding", "bfloat16 prefill"))
def test_no_copy_of_a_write_races(name, mode):
  check_write(writes(**WRITES[name]), 4, races(dma_execution_mode=mode))
  assert not races_found()


def test_a_layer_that_is_not_there_is_not_written():
  w = writes(**WRITES["decode"])
  got = tpu_write.write(w.pages, jnp.int32(2), w.k, w.v, w.slots, block_size=1, interpret=True)
  np.testing.assert_array_equal(got.kv, w.pages.kv)


@pytest.mark.parametrize(
  "page_size, itemsize, block_size, size",
  [(16, 2, 1, 2), (16, 4, 1, 1), (64, 2, 64, 16), (64, 2, 8, 8), (3, 2, 1, 1), (24, 2, 64, 12)],
)
def test_window_size(page_size, itemsize, block_size, size):
  assert tpu_write.window_size(page_size, itemsize, block_size) == size


def test_a_plan_for_the_tpu_writes_and_attends_with_the_kernels(interpreted):
  interpreted(True)
  config = paged_jax.CacheConfig(
    num_layers=2, num_kv_heads=2, head_dim=64, page_size=16, num_pages=8, num_rows=3,
    max_length=48, dtype="float32",
  )  # fmt: skip
  counts = (20, 0, 3)
  cache, _ = jitted.extend(jitted.init(config), jnp.array(counts, jnp.int32))
  rows = jnp.repeat(jnp.arange(3, dtype=jnp.int32), jnp.array(counts), total_repeat_length=23)
  positions = jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in counts])
  k, v, q = jax.random.normal(jax.random.key(0), (3, 23, 2, 64))

  def step(cache, implementation):
    plan = paged_jax.plan(cache, rows, positions, implementation=implementation)
    assert plan.implementation == implementation
    written = paged_jax.write(cache, 1, k, v, plan)
    return written.pages.kv, paged_jax.attend(written, 1, q, plan)

  run = jax.jit(step, static_argnames="implementation")
  (kernel_kv, kernel_out), (kv, out) = run(cache, "tpu"), run(cache, "xla")
  np.testing.assert_array_equal(kernel_kv, kv)
  np.testing.assert_allclose(kernel_out, out, rtol=1e-5, atol=1e-5)
