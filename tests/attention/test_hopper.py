"""The Hopper kernel: interpreted on every backend's cases, lowered for an H200, run on a Hopper."""

import contextlib
import dataclasses
import functools
import re
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_jax import attention, quantization
from paged_jax.attention import hopper, splits
from paged_jax.types import Pages, Tables

# of every kind one: the interpreter is slow
QUICK = ("decode", "mixed", "empty rows", "heads MQA", "window and start", "everything", "float16")
OWN = (
  cases.Case("head dim 256", (9, 70), (1, 3), head_dim=256, page_size=32),
  cases.Case("page larger than a chunk", (150, 70), (1, 3), num_kv_heads=1, head_dim=128,
             page_size=128, spare_rows=0),
  cases.Case("several tiles", (90,), (64,), num_heads=6, spare_rows=0),
  cases.Case("more heads than a wgmma has rows", (9, 30), (1, 1), num_heads=71, num_kv_heads=1),
)  # fmt: skip
HOPPER = jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"
interpreter = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"jax {jax.__version__} cannot interpret this kernel: it needs InterpretGPUParams",
)
hardware = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0 (Hopper)")


def served(case):
  """The case with the nearest sizes and dtype that the kernel has."""
  return dataclasses.replace(
    case,
    dtype="float16" if case.dtype == "float16" else "bfloat16",
    bits=False,
    head_dim=case.head_dim if case.storage_head_dim or case.head_dim in hopper.CHUNKS else 64,
    page_size=case.page_size if case.page_size % 16 == 0 else 16,
  )


def every(table):
  return pytest.mark.parametrize("case", table, ids=lambda case: case.name)


TABLE = tuple(
  served(case)
  for case in cases.CASES + OWN
  if case.value_dim is None and not quantization.quantized(case.dtype)
)
quick = [case for case in TABLE if case.name in QUICK or case.name in [c.name for c in OWN]]
slow = [case for case in TABLE if case not in quick]


def checked(acc_ref, a_ref, b_ref):
  """wgmma that also reads its operands: jax's interpreter looks for no race in a wgmma."""
  a_ref[...], b_ref[...]
  plgpu.commit_smem()  # these reads, other than a wgmma's, do not order themselves before a TMA copy
  _wgmma(acc_ref, a_ref, b_ref)


_wgmma = plgpu.wgmma


@pytest.fixture
def interpreted(monkeypatch):
  """Lets the backend "hopper" run interpreted; a race raises, and what is not set is NaN."""
  params = plgpu.InterpretGPUParams(detect_races=True)
  attend = functools.partial(hopper.attend, interpret=params)
  monkeypatch.setattr(hopper, "BACKEND", hopper.BACKEND._replace(attend=attend))
  cases.forget()
  monkeypatch.setattr(plgpu, "wgmma", checked)


def close(got, want, tolerance):
  got = np.asarray(got.astype(jnp.float32))
  np.testing.assert_allclose(got, np.asarray(want, np.float32), tolerance, tolerance)


def check(case):
  problem = cases.build(case)
  got, want = problem.attend("hopper"), cases.dense(case, problem)
  close(got[0], want[0], case.tolerance)
  close(got[1], want[1], case.tolerance)


def check_unmapped():
  """Of three pages the middle one is missing: as if its tokens were not there."""
  case = served(cases.Case("", (48,), (1,), page_size=16, spare_rows=0))
  p = cases.build(case)
  holey = p.tables.block_tables.at[0, 1].set(p.pages.kv.shape[0])
  out, lse = p.attend("hopper", tables=dataclasses.replace(p.tables, block_tables=holey))
  keep = np.r_[0:16, 32:48]
  kept = dataclasses.replace(
    p, k=p.k[:, keep], v=p.v[:, keep], plan=dataclasses.replace(p.plan, positions=jnp.array([31]))
  )
  want_out, want_lse = cases.dense(case, kept)
  close(out, want_out, case.tolerance)
  close(lse, want_lse, case.tolerance)


@interpreter
@every(quick)
def test_the_kernel_equals_the_definition_in_float64_without_races(case, interpreted):
  check(case)


@interpreter
@pytest.mark.sweep
@every(slow)
def test_the_kernel_equals_the_definition_in_float64_in_every_other_case(case, interpreted):
  check(case)


@interpreter
@pytest.mark.parametrize("fields", [dict(), dict(head_dim=128, page_size=128)])
def test_one_program_fills_its_ring_of_chunks_many_times(fields, interpreted, monkeypatch):
  monkeypatch.setattr(splits, "num_sms", lambda: 1)
  check(served(cases.Case("", (1100, 700), (2, 1), num_kv_heads=1, spare_rows=0, **fields)))


@interpreter
def test_unmapped_pages_are_masked(interpreted):
  check_unmapped()


@hardware
@every(TABLE)
def test_the_kernel_equals_the_definition_on_the_device(case):
  check(case)


@hardware
def test_unmapped_pages_are_masked_on_the_device():
  check_unmapped()


def h200():
  """The device that programs are lowered for, where jax has a way to say so."""
  if not hasattr(jax.sharding, "AbstractDevice"):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  explicit = (jax.sharding.AxisType.Explicit,)
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("x",), explicit, abstract_device=device)
  )


def lower(num_heads, h, d, num_tokens, *, page_size=16, softcap=None, window=None, parts=None):
  """The program for an H200 of one layer's attention; 32 rows of up to 8,192 tokens."""
  rows, pages_per_row = 32, 8192 // page_size

  def attend(q, kv, block_tables, starts, lengths, token_rows, positions):
    ok = jnp.ones(num_tokens, bool)
    tables = Tables(block_tables, starts, lengths, jnp.zeros(rows, bool))
    pages = Pages(kv, np.dtype(jnp.bfloat16), d)
    plan = cases.traced_plan(token_rows, positions, ok, pages, tables, "hopper", parts)
    return attention.attend(q, pages, 1, tables, plan, softcap=softcap, window=window)

  i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  shapes = (
    bf16((num_tokens, num_heads, d)), bf16((4096, 2, h, page_size, 2 * d)),
    i32((rows, pages_per_row)), i32((rows,)), i32((rows,)), i32((num_tokens,)), i32((num_tokens,)),
  )  # fmt: skip
  with h200():
    return jax.jit(attend).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def outputs(text: str) -> list[str]:
  """Shapes of all outputs of the kernels' launches."""
  calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
  return [shape for line in calls for shape in re.findall(r"tensor<(\w+)>", line.split("->")[-1])]


MODELS = {  # query heads, KV heads, head dim, softcap, window
  "Llama-3-8B": (32, 8, 128, None, None),
  "Qwen3-0.6B": (16, 8, 128, None, None),
  "Gemma-2-9B": (16, 8, 256, 50.0, 4096),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("num_tokens", [32, 2048], ids=["decode", "prefill"])
def test_it_lowers_for_an_h200_at_the_sizes_of(name, page_size, num_tokens):
  num_heads, h, d, softcap, window = MODELS[name]
  text = lower(num_heads, h, d, num_tokens, page_size=page_size, softcap=softcap, window=window)
  assert len(outputs(text)) == 2


@pytest.mark.parametrize(
  "group, few, rows", [(1, 1, 1), (4, 1, 4), (8, 1, 8), (7, 2, 16), (8, 4, 32)]
)
def test_only_live_rows_are_stored(group, few, rows):
  """`few` tokens of each row by `group` query heads: M rows of the 64 of a wgmma, M8 beyond 8."""
  text = lower(8 * group, 8, 128, 32 * few, parts=((32 * few, 32),))
  num_blocks = (32 * few + 32 * (few - 1)) // few
  assert outputs(text) == [
    f"1x{num_blocks}x8x{rows}x128xbf16", f"1x{num_blocks}x8x1x{max(8, rows)}xf32"
  ]  # fmt: skip


def test_parts_have_a_launch_each():
  """Prompts come in (512 + 8 * 63) // 64 blocks of 64 tokens, 256 rows, two tiles of 128."""
  text = lower(32, 8, 128, 32 + 512, parts=((32, 32), (512, 8)))
  assert outputs(text) == [
    "1x32x8x4x128xbf16", "1x32x8x1x8xf32", "1x15x8x256x128xbf16", "1x15x8x4x64xf32",
  ]  # fmt: skip


@pytest.mark.parametrize(
  "num_tokens, num_rows, longest, size",
  [
    (32, 32, 1, 1),  # rows that decode
    (160, 32, 5, 8),  # drafts
    (512, 8, 64, 64),  # prompts
    (512, 256, 512, 16),  # prompts of any rows: 16 tokens of 4 heads fill a wgmma
    (9, 2, 9, 16),
  ],
)
def test_blocks_of_prompts_fill_a_wgmma(num_tokens, num_rows, longest, size):
  assert hopper.block_size(num_tokens, num_rows, longest) == size


def pages(**fields):
  fields = dict(page_size=16, head_dim=64, dtype="bfloat16") | fields
  return cases.build(cases.Case("", (1,), (1,), **fields)).pages


@pytest.mark.parametrize(
  "why, fields",
  [
    ("kept as bfloat16 or float16, not float32: wgmma multiplies", dict(dtype="float32")),
    ("kept as bfloat16 or float16, not int8: .* as they are kept",
     dict(dtype="int8", q_dtype="bfloat16")),
    ("not float8_e4m3fn: .* queries and weights of the same dtype",
     dict(dtype="float8_e4m3fn", q_dtype="bfloat16")),
    ("kept as bfloat16 or float16, not uint16", dict(bits=True)),
    ("head_dim must be one of 64, 128, 256, not 32 .CacheConfig.storage_head_dim pads",
     dict(head_dim=32)),
    ("page_size must be a multiple of 16 that divides 128, or one of 128, not 8", dict(page_size=8)),
    ("page_size must be .* not 48", dict(page_size=48)),
    ("value_dim must be None, not 32: the kernel reads values beside keys", dict(value_dim=32)),
  ],
)  # fmt: skip
def test_it_says_why_it_refuses(why, fields):
  with pytest.raises(NotImplementedError, match=f"'hopper' cannot serve this cache: .*{why}"):
    attention.choose("hopper", pages(**fields), 16)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_device_refuses(page_size, head_dim, dtype):
  assert hopper.pages_refusal(pages(page_size=page_size, head_dim=head_dim, dtype=dtype)) is None


@pytest.mark.parametrize("capability", ["9.0", "8.0", "10.0"])
def test_on_a_gpu_it_is_chosen_on_hopper_only(capability, monkeypatch):
  device = types.SimpleNamespace(compute_capability=capability)
  bf16, int8 = pages(), pages(dtype="int8", q_dtype="bfloat16")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert attention.candidates(int8, 16) == ["gpu", "xla"]
  assert (attention.choose(None, bf16, 16) == "hopper") == (capability == "9.0")
  if capability != "9.0":
    with pytest.raises(NotImplementedError, match=rf"capability 9\.0, not {capability}"):
      attention.choose("hopper", bf16, 16)


def test_a_jax_that_lacks_a_part_of_mosaic_gpu_is_refused(monkeypatch):
  monkeypatch.delattr(plgpu, "wgmma")
  with pytest.raises(NotImplementedError, match=f"jax {jax.__version__} lacks wgmma"):
    attention.choose("hopper", pages(), 16)
