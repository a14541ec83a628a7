"""The TPU kernels interpreted: on the same cases, to the same tolerance, as every backend."""

import dataclasses
import functools
import types
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import paged_jax
from paged_jax import jitted, quantization
from paged_jax import pages as pages_lib
from paged_jax.attention import tpu, tpu_write
from paged_jax.types import Pages

# what another case covers, too, on this backend; run by the sweep
COVERED = ("prefill", "prefill of two rows", "chunked prefill", "padding between rows", "heads MHA",
           "head dim 5", "page size 8", "page size 16", "window 1", "window traced",
           "window traced, none", "scale", "softcap", "softcap traced", "sinks")  # fmt: skip
# of every kind one, small: the interpreter that knows of races and uninitialised memory is slow
STRICT = ("decode", "mixed", "empty rows", "tokens refused", "window and start", "everything",
          "parts, drafts and a prompt, idle rows", "bfloat16, page size 1", "values in keys",
          "values in keys, prompts", "int8, large pages, everything",
          "float8_e4m3fn, large pages, values in keys")  # fmt: skip
SERVED = [
  pytest.param(c, marks=pytest.mark.sweep if c.name in COVERED else ())
  for c in cases.CASES
  if not c.bits and c.dtype != "float16" and c.name not in STRICT
  if not quantization.quantized(c.dtype) or c.page_size % 128 == 0
]
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
    attend, write = (
      functools.partial(f, interpret=interpret) for f in (tpu.attend, tpu_write.write)
    )
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


def test_a_head_alone_has_the_same_bits(interpreted):
  """So answers do not depend on how many chips heads are split over."""
  interpreted(True)
  problem = cases.build(next(c for c in cases.CASES if c.name == "int8, large pages, everything"))
  whole, _ = problem.attend("tpu")
  pages, group = problem.pages, whole.shape[1] // problem.pages.kv.shape[2]
  for head in range(pages.kv.shape[2]):
    mine = slice(head * group, (head + 1) * group)
    alone, _ = problem.attend(
      "tpu",
      q=problem.q[:, mine],
      pages=dataclasses.replace(
        pages,
        kv=pages.kv[:, :, head : head + 1],
        scales=pages.scales[:, :, 2 * head : 2 * head + 2],
      ),
      options=problem.options | {"sinks": problem.options["sinks"][mine]},
    )
    np.testing.assert_array_equal(alone, whole[:, mine])


@in_dma_modes(STRICT, ("mixed", "window and start", "everything", "int8, large pages, everything"))
def test_no_copy_races_and_nothing_uninitialised_is_used(name, mode, interpreted):
  interpreted(races(dma_execution_mode=mode))
  check(next(c for c in cases.CASES if c.name == name))
  assert not races_found()


class Writes(NamedTuple):
  """Rows' tokens written at once, and what the page array must then hold."""

  pages: Pages
  slots: jax.Array
  k: jax.Array
  v: jax.Array | None


def writes(
  counts,
  positions,
  *,
  page_size,
  dtype="float32",
  padding=0,
  skipped=(),
  refused=(),
  h=2,
  d=4,
  value_dim=None,
  seed=0,
) -> Writes:
  """`counts[r]` tokens of row r from `positions[r]` on, its pages anywhere; padding between rows.

  The tokens `skipped` of the batch are left out of it; those `refused` have no slot.
  """
  rng = np.random.default_rng(seed)
  per_row = max(-(-(p + c) // page_size) for p, c in zip(positions, counts))
  n = per_row * len(counts) + 1
  tables = rng.permutation(n)[: n - 1].reshape(len(counts), per_row)
  slots = []
  for table, count, position in zip(tables, counts, positions):
    at = np.arange(position, position + count)
    slots += [n * page_size + len(slots) + i for i in range(padding)]
    slots += (table[at // page_size] * page_size + at % page_size).tolist()
  slots = [n * page_size + i if i in refused else slot for i, slot in enumerate(slots)]
  slots = [slot for i, slot in enumerate(slots) if i not in skipped]
  width = 2 * d if value_dim is None else d
  kv = rng.standard_normal((n, 2, h, page_size, width)).astype(dtype)
  scales, given = None, dtype
  if quantization.quantized(dtype):
    shape = n, 2, h * width // d, page_size
    scales = jnp.array(np.where(rng.random(shape) < 0.5, np.nan, rng.random(shape)), jnp.float32)
    given = "float32"
  k, v = rng.standard_normal((2, len(slots), h, d)).astype(given)
  pages = Pages(jnp.array(kv), np.dtype(dtype), d, value_dim, scales)
  slots = jnp.array(slots, jnp.int32)
  return Writes(pages, slots, jnp.array(k), jnp.array(v) if value_dim is None else None)


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
  "page size 128": dict(counts=(140, 9), positions=(60, 120), page_size=128),
  "whole pages, and rows that begin and end within one": dict(
    counts=(16, 21, 7), positions=(0, 5, 8), page_size=8
  ),
  "skipped places": dict(counts=(12, 6), positions=(2, 5), page_size=8, skipped=(3, 6, 7, 13)),
  "tokens refused": dict(counts=(9, 5), positions=(3, 6), page_size=8, refused=(0, 6, 7, 11)),
  "bfloat16": dict(counts=(1, 1, 6), positions=(4, 1, 13), page_size=4, dtype="bfloat16"),
  "bfloat16 prefill": dict(counts=(45, 20), positions=(3, 13), page_size=32, dtype="bfloat16"),
  "keys alone": dict(counts=(1, 3, 9), positions=(4, 1, 13), page_size=8, h=1, value_dim=3),
  "keys alone, bfloat16, skipped": dict(
    counts=(45, 20), positions=(3, 13), page_size=32, dtype="bfloat16", value_dim=4, skipped=(4, 30)
  ),
  "bfloat16, skipped and refused": dict(
    counts=(20, 18),
    positions=(3, 16),
    page_size=16,
    dtype="bfloat16",
    skipped=(4, 30),
    refused=(9,),
  ),
  "int8": dict(counts=(1, 1, 1), positions=(4, 0, 255), page_size=128, dtype="int8"),
  "int8, more rows than slots of the ring": dict(
    counts=(1,) * 70, positions=tuple(range(100, 170)), page_size=128, dtype="int8"
  ),
  "int8 prefill": dict(
    counts=(160, 1, 9), positions=(100, 7, 250), page_size=256, dtype="int8", padding=2
  ),
  "int8, skipped and refused": dict(
    counts=(20, 30, 9),
    positions=(3, 115, 0),
    page_size=128,
    dtype="int8",
    skipped=(4, 30),
    refused=(0, 9, 40, 56),
  ),
  "float8_e4m3fn": dict(
    counts=(3, 50), positions=(126, 96), page_size=128, dtype="float8_e4m3fn", skipped=(20,)
  ),
  "int8, keys alone": dict(
    counts=(4, 40), positions=(1, 100), page_size=128, dtype="int8", h=1, value_dim=3
  ),
}
SHORT = ("decode", "decode, more rows than slots of the ring", "several tokens per row",
         "page size 1", "bfloat16", "int8", "int8, more rows than slots of the ring")  # fmt: skip
LONG = ("prefill across pages and windows", "padding", "nothing but padding", "odd page size",
        "page size 128", "whole pages, and rows that begin and end within one", "skipped places",
        "tokens refused", "bfloat16 prefill", "bfloat16, skipped and refused", "int8 prefill",
        "int8, skipped and refused", "float8_e4m3fn", "int8, keys alone")  # fmt: skip
# What a write in blocks of 4 holds is checked where its copies may not race.
BLOCKS = [(n, 1) for n in SHORT] + [(n, 64) for n in LONG]


def writer(block_size, interpret):
  def write(pages, layer, k, v, slots):
    part = types.SimpleNamespace(windows=tpu_write.windows(pages, slots, block_size))
    plan = types.SimpleNamespace(parts=[part])
    return tpu_write.write(pages, layer, k, v, plan, interpret=interpret)

  return jax.jit(write, compiler_options=cases.INTERPRETER)


def check_write(w: Writes, block_size, interpret):
  args = (w.pages, jnp.int32(1), w.k, w.v, w.slots)
  got, want = writer(block_size, interpret)(*args), scatter(*args)
  jax.tree.map(np.testing.assert_array_equal, got, want)


scatter = jax.jit(pages_lib.write)


@pytest.mark.parametrize(("name", "block_size"), BLOCKS)
def test_the_write_equals_a_scatter_bit_by_bit(name, block_size):
  check_write(writes(**WRITES[name]), block_size, True)


@pytest.mark.parametrize("block_size", [4, 16])
def test_the_write_equals_a_scatter_for_any_runs(block_size):
  w = writes((40,), (0,), page_size=16)
  kv = jnp.concatenate([w.pages.kv] * 3)  # two pages for each of six rows
  pages = dataclasses.replace(w.pages, kv=kv)
  write = writer(block_size, True)
  for seed in range(20):
    rng = np.random.default_rng(seed)
    slots = [rng.integers(0, 16) + np.arange(rng.integers(1, 33)) for _ in range(6)]
    slots = [at[rng.random(len(at)) < rng.choice([0.7, 1])] for at in slots]
    slots = np.concatenate([at[at < 32] + 32 * page for page, at in enumerate(slots)])
    nowhere = 9999 + np.arange(200)
    refused = rng.random(len(slots)) < rng.choice([0.1, 0])
    slots = np.append(np.where(refused, nowhere[: len(slots)], slots), nowhere)[:40]
    args = (pages, jnp.int32(1), w.k, w.v, jnp.array(slots, jnp.int32))
    np.testing.assert_array_equal(write(*args).kv, scatter(*args).kv)


@in_dma_modes(
  WRITES,
  (
    "decode, more rows than slots of the ring",
    "padding",
    "skipped places",
    "bfloat16 prefill",
    "int8 prefill",
    "int8, skipped and refused",
  ),
)
def test_no_copy_of_a_write_races(name, mode):
  check_write(writes(**WRITES[name]), 4, races(dma_execution_mode=mode))
  assert not races_found()


@pytest.mark.parametrize(
  ("most", "page_size", "dtype"), [(1, 16, "float32"), (4, 128, "int8"), (7, 16, "float32")]
)
def test_more_tokens_than_a_kernel_takes_are_written_by_several(
  most, page_size, dtype, monkeypatch
):
  monkeypatch.setattr(tpu_write, "MAX_TOKENS", most)
  w = writes((6, 2), (page_size - 3, 6), page_size=page_size, padding=1, dtype=dtype)
  check_write(w, 4, True)


@pytest.mark.parametrize("name", ["decode", "int8"])
def test_a_layer_that_is_not_there_is_not_written(name):
  w = writes(**WRITES[name])
  got = writer(1, True)(w.pages, jnp.int32(2), w.k, w.v, w.slots)
  jax.tree.map(np.testing.assert_array_equal, got, w.pages)


def page_array(page_size, dtype="bfloat16", h=8, d=128, n=9):
  return Pages(jax.ShapeDtypeStruct((n, 2, h, page_size, 2 * d), dtype), np.dtype(dtype), d)


@pytest.mark.parametrize(
  "pages, block_size, size",
  [
    (page_array(16), 1, 2),
    (page_array(16, "float32"), 1, 1),
    (page_array(64), 64, 64),
    (page_array(64), 5, 4),
    (page_array(64), 8, 8),
    (page_array(128), 64, 64),
    (page_array(48), 64, 48),
    (page_array(24), 16, 8),  # 12 rows are no whole tiles
    (page_array(176), 64, 16),
    (page_array(12), 64, 4),
    (page_array(3, "float32"), 1, 1),
    (page_array(64, h=32), 64, 32),  # four of them, and their tokens, fit
    (page_array(64, "float32", h=64, d=256), 64, 4),
    (page_array(128, "int8"), 1, 4),
    (page_array(128, "int8"), 64, 64),
  ],
)
def test_window_size(pages, block_size, size):
  assert tpu_write.window_size(pages, block_size) == size


@pytest.mark.parametrize(
  "slots, runs, shared",
  [
    ([6, 7, 8, 9, 12, 13], [(6, 2), (8, 2), (12, 2)], False),
    ([6, 7, 13, 14], [(6, 2), (13, 2)], False),
    ([4, 6, 7, 8], [(4, 1), (6, 2), (8, 1)], True),
    ([4, 5, 99, 6, 7], [(4, 2), (6, 2)], True),
    ([99, 4, 5, 6, 7, -1, 0], [(4, 4), (0, 1)], False),
    ([35, 36, 37], [(35, 1)], False),
    ([36, 37], [], False),
  ],
)
def test_windows_are_the_runs_of_slots_that_stand_side_by_side(slots, runs, shared):
  windows = tpu_write.of_kernel(page_array(4, "float32"), jnp.array(slots, jnp.int32), size=4)
  assert windows.size == 4 and windows.count == len(runs) and windows.shared == shared
  firsts = [slots.index(slot) for slot, _ in runs]
  spare = len(slots) - len(runs)
  assert windows.first.tolist() == firsts + [len(slots)] * spare
  assert windows.lengths.tolist() == [length for _, length in runs] + [0] * spare
  assert windows.slots.tolist()[: len(runs)] == [slot for slot, _ in runs]


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
