"""The Hopper kernel: interpreted on the table of cases, lowered without a GPU, run on one if there.

Cases are adapted to what it serves: 16-bit floats, head dims 64 to 256, pages of 16 tokens or more.
The interpreter of jax 0.12 does not see races with what wgmma reads (it keeps no clocks there), so
no test fails without the wait for zeroed values; a copied id out of range reads zeros, as by TMA.
"""

import contextlib
import dataclasses
import functools
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_jax import attention
from paged_jax.attention import hopper
from paged_jax.types import Pages, Plan, Tables


def adapted(case: cases.Case) -> cases.Case:
  return dataclasses.replace(
    case,
    dtype="float16" if case.dtype == "float16" else "bfloat16",
    bits=False,
    head_dim=max(64, case.head_dim),
    page_size=max(16, case.page_size),
  )


EVERY = (
  *map(adapted, cases.CASES),
  cases.Case("pages of 32", (70, 40, 33), (1, 5, 2), dtype="bfloat16", head_dim=64, page_size=32),
  cases.Case("pages of 64", (200, 40, 64), (1, 5, 2), dtype="bfloat16", head_dim=128, page_size=64),
  cases.Case("pages of two chunks", (300, 40, 128), (1, 5, 2), dtype="bfloat16", head_dim=128,
             page_size=128, window=70),
  cases.Case("head dim 256", (90, 40), (1, 20), dtype="bfloat16", head_dim=256, softcap=3.0,
             page_size=16, num_heads=8, spare_rows=0),
  cases.Case("two warpgroups, two tiles", (130, 90), (60, 64), dtype="bfloat16", head_dim=64,
             page_size=16, num_heads=6, spare_rows=0),
)  # fmt: skip
QUICK = ("decode", "mixed", "empty rows", "tokens refused", "window and start", "everything",
         "heads MQA", "float16", "pages of two chunks", "head dim 256",
         "two warpgroups, two tiles")  # fmt: skip
TABLE = [
  pytest.param(case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.sweep)
  for case in EVERY
]
interpreter = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"), reason="this jax does not interpret wgmma"
)


@pytest.fixture
def backend(monkeypatch):
  """Adds the backend "hopper", interpreted or not."""

  def use(interpret=False):
    attend = functools.partial(hopper.attend, interpret=interpret)
    monkeypatch.setitem(attention._BACKENDS, "hopper", types.SimpleNamespace(attend=attend))

  return use


@pytest.fixture
def interpreted(backend):
  """Races and reads of uninitialised memory are errors or NaN."""
  backend(plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan"))


def check(case, problem=None, want=None):
  problem = problem or cases.build(case)
  out, lse = problem.attend("hopper")
  assert out.dtype == problem.q.dtype and lse.dtype == jnp.float32
  for got, wanted in zip((out, lse), want or cases.dense(case, problem)):
    np.testing.assert_allclose(
      np.asarray(got.astype(jnp.float32)), np.asarray(wanted, np.float32), case.tolerance,
      case.tolerance,
    )  # fmt: skip


@interpreter
@pytest.mark.parametrize("case", TABLE)
def test_the_kernel_equals_the_definition_in_float64(case, interpreted):
  check(case)


@interpreter
@pytest.mark.parametrize(
  "case",
  [
    cases.Case("one warpgroup", (1100, 3), (1, 1), dtype="bfloat16", head_dim=64, page_size=16,
               num_heads=2, num_kv_heads=1),
    cases.Case("two warpgroups", (1100,), (40,), dtype="bfloat16", head_dim=64, page_size=128,
               num_heads=2, num_kv_heads=1, spare_rows=0),
    cases.Case("head dim 256", (300, 20), (1, 1), dtype="bfloat16", head_dim=256, page_size=32,
               num_heads=2, num_kv_heads=1),
  ],
  ids=lambda case: case.name,
)  # fmt: skip
def test_the_ring_of_chunks_is_used_again(case, interpreted, monkeypatch):
  monkeypatch.setattr(hopper, "splits", lambda programs, most: 1)
  check(case)


@interpreter
def test_unmapped_pages_are_masked(interpreted):
  """Of pages of 16 tokens the second is missing: as if its tokens were not there."""
  case = cases.Case("", (40,), (1,), page_size=16, head_dim=64, dtype="bfloat16", spare_rows=0)
  p = cases.build(case)
  holey = p.tables.block_tables.at[0, 1].set(p.pages.kv.shape[0])
  p = dataclasses.replace(p, tables=dataclasses.replace(p.tables, block_tables=holey))
  keep = np.r_[:16, 32:40]
  kept = dataclasses.replace(
    p, k=p.k[:, keep], v=p.v[:, keep], plan=dataclasses.replace(p.plan, positions=jnp.array([23]))
  )
  check(case, p, cases.dense(case, kept))


def hopper_device() -> bool:
  device = jax.devices()[0]
  return device.platform == "gpu" and device.compute_capability == "9.0"


@pytest.mark.skipif(not hopper_device(), reason="needs an NVIDIA GPU of compute capability 9.0")
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_the_compiled_kernel_equals_the_definition_in_float64(case, backend):
  backend()
  check(case)


MODELS = {  # query heads, KV heads, head dim, softcap
  "Llama-3-8B": (32, 8, 128, None),
  "Qwen3-32B": (64, 8, 128, None),
  "Gemma-2-9B": (16, 8, 256, 50.0),
}


def h200():
  """Lowering as if for an H200, where jax has abstract devices for it."""
  try:
    device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
  except TypeError:
    return contextlib.nullcontext()
  axes = (jax.sharding.AxisType.Explicit,)
  mesh = jax.sharding.AbstractMesh((1,), ("_",), axes, abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def step(model: str, page_size: int, num_tokens: int):
  """One call for 32 rows of up to 8192 tokens, and the types of its arguments."""
  num_heads, h, d, softcap = MODELS[model]
  s, n, p = 32, 4096, 8192 // page_size

  def attend(q, kv, block_tables, starts, lengths, rows, positions):
    blocks, block_lengths, block_size = attention.schedule(rows, s)
    plan = Plan(rows, positions, positions, positions >= 0, blocks, block_lengths,
                block_size=block_size, implementation="hopper")  # fmt: skip
    return hopper.attend(
      q, Pages(kv, np.dtype(kv.dtype)), jnp.int32(1),
      Tables(block_tables, starts, lengths, lengths < 0), plan, scale=jnp.float32(d**-0.5),
      window=jnp.int32(4096), softcap=softcap and jnp.float32(softcap), sinks=None,
    )  # fmt: skip

  bf16, i32 = (functools.partial(jax.ShapeDtypeStruct, dtype=x) for x in (jnp.bfloat16, jnp.int32))
  return attend, (
    bf16((num_tokens, num_heads, d)), bf16((n, 2, h, page_size, 2 * d)), i32((s, p)), i32((s,)),
    i32((s,)), i32((num_tokens,)), i32((num_tokens,)),
  )  # fmt: skip


@pytest.mark.parametrize("num_tokens", [32, 2048], ids=["decode", "prefill"])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("model", MODELS)
def test_the_kernel_lowers_for_a_gpu_where_there_is_none(model, page_size, num_tokens):
  attend, arguments = step(model, page_size, num_tokens)
  with h200():
    lowered = jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu") > 0


def pages(dtype="bfloat16", d=128, t=16, storage=None) -> Pages:
  return Pages(jax.ShapeDtypeStruct((8, 2, 2, t, 2 * d), storage or dtype), np.dtype(dtype))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("t", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_pages_are_served_on_hopper(dtype, t, d):
  assert hopper.refusal(pages(dtype, d, t), 9.0) is None


@pytest.mark.parametrize(
  "served, capability, why",
  [
    (pages(), None, "compute capability"),
    (pages(), 8.0, "compute capability"),
    (pages(), 10.0, "compute capability"),
    (pages("float32"), 9.0, "float32"),
    (pages(storage="uint16"), 9.0, "uint16"),
    (pages(d=96), 9.0, "not 96"),
    (pages(t=8), 9.0, "not 8"),
    (pages(t=48), 9.0, "not 48"),
  ],
)
def test_a_refusal_says_why(served, capability, why):
  assert why in hopper.refusal(served, capability)


def test_a_jax_without_the_needed_parts_is_refused(monkeypatch):
  monkeypatch.delattr(plgpu, "wgmma")
  assert "wgmma" in hopper.refusal(pages(), 9.0)


@pytest.mark.parametrize(
  "programs, most, splits",
  [(1, 1, 1), (1, 4, 4), (106, 64, 1), (66, 64, 2), (64, 64, 2), (1000, 64, 1), (8, 1000, 15)],
)
def test_splits_fill_the_last_wave(programs, most, splits):
  assert hopper.splits(programs, most) == splits
