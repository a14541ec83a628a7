"""The GPU kernel interpreted, on the same cases as every backend; lowered; and run, on a GPU."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib import triton
from jax._src.lib.mlir import ir

from paged_jax import attention
from paged_jax.attention import gpu
from paged_jax.types import Pages, Plan, Tables

OPTIONS = (
  "decode", "chunked prefill", "mixed", "lengths at page boundaries", "empty rows",
  "padding between rows", "tokens refused", "rows that start late", "heads MHA", "heads MQA",
  "window traced", "window and start", "scale traced", "softcap", "sinks, padding, refused",
  "everything", "bfloat16, everything", "float16 bits",
)  # fmt: skip
named = {case.name: case for case in cases.CASES}
by_name = functools.partial(pytest.mark.parametrize, ids=lambda case: case.name)


def at_kernel_sizes(case):
  """The case with sizes that the kernel serves also when it is not interpreted."""
  return dataclasses.replace(case, page_size=16, head_dim=64)


@pytest.fixture
def interpreted(monkeypatch):
  backend = types.SimpleNamespace(attend=functools.partial(gpu.attend, interpret=True))
  monkeypatch.setitem(attention._BACKENDS, "gpu", backend)


@pytest.fixture
def splits(monkeypatch):
  """Sets the number of splits."""
  return lambda number: monkeypatch.setattr(gpu.splits, "count", lambda *_: number)


def close(got, want, tolerance):
  np.testing.assert_allclose(
    np.asarray(got.astype(jnp.float32)), np.asarray(want, np.float32), tolerance, tolerance
  )


def check(case):
  problem = cases.build(case)
  out, lse = problem.attend("gpu")
  want_out, want_lse = cases.dense(case, problem)
  assert out.dtype == problem.q.dtype and lse.dtype == jnp.float32
  close(out, want_out, case.tolerance)
  close(lse, want_lse, case.tolerance)


@by_name("case", cases.CASES)
def test_the_kernel_equals_the_definition_in_float64(case, interpreted):
  check(case)


@by_name("case", [at_kernel_sizes(named[name]) for name in OPTIONS])
def test_every_option_at_sizes_of_the_hardware(case, interpreted):
  check(case)


@pytest.mark.parametrize("number", [1, 2, 3, 40])
@pytest.mark.parametrize("name", ["several chunks, prefill", "window far behind", "everything"])
def test_any_number_of_splits_gives_the_same(name, number, interpreted, splits):
  splits(number)
  check(dataclasses.replace(named[name], sinks=True))  # sinks must count once


@pytest.mark.parametrize("number", [1, 2])
def test_unmapped_pages_are_masked(number, interpreted, splits):
  """Of three pages of 64 tokens the middle one is missing: as if its tokens were not there."""
  splits(number)
  case = cases.Case("", (180,), (1,), page_size=64, head_dim=64, spare_rows=0)
  p = cases.build(case)
  holey = p.tables.block_tables.at[0, 1].set(p.pages.kv.shape[0])
  out, lse = p.attend("gpu", tables=dataclasses.replace(p.tables, block_tables=holey))
  keep = np.r_[0:64, 128:180]
  kept = dataclasses.replace(
    p, k=p.k[:, keep], v=p.v[:, keep], plan=dataclasses.replace(p.plan, positions=jnp.array([115]))
  )
  want_out, want_lse = cases.dense(case, kept)
  close(out, want_out, 1e-5)
  close(lse, want_lse, 1e-5)


def test_vmap_over_caches_equals_one_at_a_time(interpreted):
  many = [cases.build(named["mixed"], seed) for seed in range(2)]
  args = [(p.q, p.pages, p.tables, dataclasses.replace(p.plan, implementation="gpu")) for p in many]
  attend = jax.jit(lambda q, pages, tables, plan: attention.attend(q, pages, 1, tables, plan))
  out, lse = jax.vmap(attend)(*jax.tree.map(lambda *x: jnp.stack(x), *args))
  for i, each in enumerate(args):
    jax.tree.map(functools.partial(close, tolerance=1e-6), (out[i], lse[i]), attend(*each))


@pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs an NVIDIA GPU of compute capability 8.0 or more"
)
@by_name("case", [c if c.head_dim >= 64 else at_kernel_sizes(c) for c in cases.CASES])
def test_the_kernel_on_hardware(case):
  check(case)


# By query heads, KV heads, head dim and options.
MODELS = {
  "Llama 3 8B": (32, 8, 128, {}),
  "Qwen3 32B": (64, 8, 128, {}),
  "Gemma 2 9B": (16, 8, 256, {"softcap": 50.0, "window": 4096}),
}


def lowered(name="Llama 3 8B", *, page_size=16, queries=1, num_pages=64, dtype="bfloat16"):
  """`attend` of 32 rows lowered for a GPU that is not there."""
  num_heads, h, d, options = MODELS[name]
  shape = jax.ShapeDtypeStruct
  ids = functools.partial(shape, dtype=jnp.int32)
  tables = Tables(ids((32, 8192 // page_size)), ids((32,)), ids((32,)), shape((32,), jnp.bool_))
  kv = shape((num_pages, 32, h, page_size, 2 * d), dtype)
  rows = ids((32 * queries,))

  def attend(q, kv, layer, tables, rows, positions):
    blocks, lengths, block_size = attention.schedule(rows, 32)
    plan = Plan(rows, positions, positions, rows >= 0, blocks, lengths, block_size, "gpu")
    return attention.attend(q, Pages(kv, np.dtype(dtype)), layer, tables, plan, **options)

  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  axis = jax.sharding.AxisType.Explicit
  mesh = jax.sharding.AbstractMesh((1,), ("_",), (axis,), abstract_device=device)
  q = shape((32 * queries, num_heads, d), dtype)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(attend).trace(q, kv, ids(()), tables, rows, rows)
    return traced.lower(lowering_platforms=("cuda",))


def kernel(lowered) -> str:
  """The kernel in Triton's language."""
  calls = []

  def visit(op):
    if "__gpu$xla.gpu.triton" in str(op.attributes.get("call_target_name", "")):
      calls.append(op.attributes["mhlo.backend_config"]["ir"].value_bytes)
    return ir.WalkResult.ADVANCE

  lowered.compiler_ir("stablehlo").operation.walk(visit)
  with ir.Context() as context:
    triton.dialect.register_dialect(context)
    return str(ir.Module.parse(calls[0]))


# jax 0.11 and newer. Python shows users no DeprecationWarning from inside of a library.
triton_is_deprecated = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


@triton_is_deprecated
@pytest.mark.parametrize("queries", [1, 64], ids=["decode", "prefill"])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_lowers_for_a_gpu(name, page_size, queries):
  program = lowered(name, page_size=page_size, queries=queries)
  assert program.as_text().count("__gpu$xla.gpu.triton") == 1


@triton_is_deprecated
@pytest.mark.parametrize("dtype, number", [("float32", 0), ("bfloat16", 2)])
def test_products_of_float32_are_not_rounded_to_tf32(dtype, number):
  text = kernel(lowered(dtype=dtype))
  assert text.count("tt.dot ") == 2
  assert text.count("inputPrecision = tf32") == number  # no matter for 16 bits


@triton_is_deprecated
@pytest.mark.parametrize(
  "dtype, gib, width", [("bfloat16", 4, 32), ("float32", 4, 32), ("bfloat16", 5, 64),
                        ("bfloat16", 80, 64), ("float32", 80, 64)],
)  # fmt: skip
def test_offsets_into_the_pool_cannot_overflow(dtype, gib, width):
  """Up to 4 GiB, which is 2**31 elements of 16 bits, they fit 31 bits."""
  page_bytes = 32 * 8 * 16 * 256 * np.dtype(dtype).itemsize
  text = kernel(lowered(dtype=dtype, num_pages=gib * 2**30 // page_bytes))
  chunk, element = {"bfloat16": (64, "bf16"), "float32": (32, "f32")}[dtype]
  pointers, offsets = (f"tensor<{chunk}x128x{x}>" for x in (f"!tt.ptr<{element}>", f"i{width}"))
  assert text.count(f": {pointers}, {offsets}") == 2  # keys and values


@pytest.mark.parametrize(
  "why, fields",
  [
    ("head_dim must be a power of two from 16 to 256, not 96", dict(head_dim=96)),
    ("head_dim must be a power of two from 16 to 256, not 512", dict(head_dim=512)),
    ("head_dim must be a power of two from 16 to 256, not 8", dict(head_dim=8)),
  ],
)
def test_the_kernel_says_why_it_refuses_pages(why, fields):
  pages = cases.build(cases.Case("", (1,), (1,), **fields)).pages
  with pytest.raises(NotImplementedError, match=f"'gpu' cannot serve this cache: .*{why}"):
    attention.choose("gpu", pages)


def test_eight_bit_pages_are_refused():
  """Their offsets overflow from 2 to 4 GiB."""
  pages = Pages(jnp.zeros((1, 1, 1, 16, 128), jnp.int8), np.dtype("int8"))
  assert gpu.refusal(pages) == "pages must hold float32, bfloat16 or float16, not int8"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
def test_any_page_size_is_served(dtype, bits, page_size):
  case = cases.Case("", (1,), (1,), head_dim=64, page_size=page_size, dtype=dtype, bits=bits)
  assert gpu.refusal(cases.build(case).pages) is None


@pytest.mark.parametrize(
  "capability, served",
  [("7.5", False), ("8.0", True), ("8.9", True), ("9.0", True), ("12.1", True), ("gfx942", False)],
)
def test_the_gpu_must_be_new_enough(capability, served, monkeypatch):
  device = types.SimpleNamespace(compute_capability=capability)
  pages = cases.build(at_kernel_sizes(named["decode"])).pages
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  why = f"the GPU must be of compute capability 8.0 or more, not {capability}"
  assert gpu.refusal(pages) == (None if served else why)
  assert attention.choose(None, pages) == ("gpu" if served else "xla")


def test_the_benchmark_runs_without_a_gpu_only_if_told_to():
  root = pathlib.Path(__file__).parents[2]
  command = [sys.executable, root / "benchmarks" / "kernels_gpu.py"]
  run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=root, timeout=300)
  told = run([*command, "--smoke", "--json"])
  assert told.returncode == 0, told.stderr
  (row,) = json.loads(told.stdout.splitlines()[-1])["rows"]
  assert row["implementation"] == "gpu" and row["paged us"] > 0 and row["gather + xla us"] > 0
  if jax.default_backend() != "gpu":
    refused = run(command)
    assert refused.returncode == 1 and "needs an NVIDIA GPU" in refused.stderr
