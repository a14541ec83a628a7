"""The GPU kernel: interpreted on the table of cases, lowered for an H200, and run where a GPU is."""

import dataclasses
import functools
import re
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.triton import lowering

from paged_jax import CacheConfig, attention
from paged_jax import pages as pages_lib
from paged_jax.attention import gpu
from paged_jax.types import Tables

pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
needs_gpu = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs an NVIDIA GPU of compute capability 8.0 or later"
)


def served(case: cases.Case) -> cases.Case:
  """The case with a stored head dim that the kernel serves."""
  if case.value_dim is not None:
    config = CacheConfig(head_dim=case.head_dim, value_dim=case.value_dim).stored_for("gpu")
    return dataclasses.replace(case, storage_head_dim=config.array_head_dim)
  kept = case.storage_head_dim or case.head_dim in (64, 128)
  return case if kept else dataclasses.replace(case, head_dim=16)


AT_16 = [
  dataclasses.replace(served(c), name=f"{c.name}, page size 16", page_size=16)
  for c in cases.CASES
  if c.page_size == 3
]
CASES = (
  *map(served, cases.CASES),
  cases.Case("heads 28 over 4", (90, 40), (70, 33), num_heads=28, num_kv_heads=4, head_dim=16,
             page_size=16, spare_rows=0),
  cases.Case("heads 71 over 1", (9, 30), (1, 4), num_heads=71, num_kv_heads=1, head_dim=64),
  cases.Case("head dim 256", (9, 140), (1, 6), head_dim=256, page_size=16, softcap=5.0),
  cases.Case("head dim 256, bfloat16", (9, 140), (1, 140), head_dim=256, page_size=64,
             dtype="bfloat16", window=50, spare_rows=0),
  cases.Case("page size 128", (300, 129), (1, 1), head_dim=32, page_size=128, dtype="float16"),
)  # fmt: skip
FEW = [c for c in CASES if c.name in ("several chunks", "window far behind", "everything", "sinks")]


def as_backend(monkeypatch, **options):
  attend = functools.partial(gpu.attend, **options)
  monkeypatch.setattr(gpu, "BACKEND", gpu.BACKEND._replace(attend=attend))
  cases.forget(keep=f"gpu {options}")


@pytest.fixture
def interpreted(monkeypatch):
  as_backend(monkeypatch, interpret=True)


def close(got, want, tolerance):
  for a, b in zip(got, want):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, tolerance, tolerance)


def check(case):
  problem = cases.build(case)
  assert gpu.refusal(problem.pages, 16) is None
  close(problem.attend("gpu"), cases.dense(case, problem), case.tolerance)


@pytest.mark.parametrize(
  "case", [*CASES, *(pytest.param(c, marks=pytest.mark.sweep) for c in AT_16)],
  ids=lambda case: case.name,
)  # fmt: skip
def test_the_kernel_equals_the_definition_in_float64(case, interpreted):
  check(case)


@needs_gpu
@pytest.mark.parametrize("case", [*CASES, *AT_16], ids=lambda case: case.name)
def test_the_compiled_kernel_equals_the_definition_in_float64(case, monkeypatch):
  as_backend(monkeypatch)
  check(case)


@pytest.mark.parametrize("num_sms", [1, 30, 10_000])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_rows_are_split_into_any_number_of_shares(case, num_sms, interpreted, monkeypatch):
  monkeypatch.setattr(gpu.splits, "num_sms", lambda: num_sms)
  cases.forget(keep=f"gpu on {num_sms} SMs")
  check(case)


def test_unmapped_pages_are_masked(interpreted):
  """Of three pages of two tokens the middle one is missing: as if its tokens were not there."""
  case = cases.Case("", (6,), (1,), page_size=2, head_dim=16, spare_rows=0)
  p = cases.build(case)
  holey = p.tables.block_tables.at[0, 1].set(p.pages.kv.shape[0])
  got = p.attend("gpu", tables=dataclasses.replace(p.tables, block_tables=holey))
  keep = np.array([0, 1, 4, 5])
  kept = dataclasses.replace(
    p, k=p.k[:, keep], v=p.v[:, keep], plan=dataclasses.replace(p.plan, positions=jnp.array([3]))
  )
  close(got, cases.dense(case, kept), 1e-5)


def test_vmap_over_caches_equals_one_at_a_time(interpreted):
  many = [cases.build(served(cases.CASES[0]), seed) for seed in range(3)]
  many = [(p.q, p.pages, p.layer, p.tables, dataclasses.replace(p.plan, implementation="gpu"))
          for p in many]  # fmt: skip
  together = jax.jit(jax.vmap(attention.attend))(*jax.tree.map(lambda *x: np.stack(x), *many))
  one = jax.jit(attention.attend)
  for i, args in enumerate(many):
    close([x[i] for x in together], one(*args), 1e-5)


def pages(d, dtype="bfloat16", t=16, value_dim=None, num_pages=4):
  config = CacheConfig(num_layers=2, num_kv_heads=2, head_dim=d, dtype=dtype, page_size=t,
                       value_dim=value_dim, num_pages=num_pages)  # fmt: skip
  return jax.eval_shape(functools.partial(pages_lib.init, config))


@pytest.mark.parametrize(
  "pages, why",
  [
    (pages(8), "head_dim must be a power of two from 16 to 256, not 8"),
    (pages(96), "not 96 (CacheConfig.stored_for pads smaller ones)"),
    (pages(512), "not 512"),
    (pages(576, value_dim=500), "value_dim must be a power of two from 16 to 512, not 500"),
    (
      pages(560, value_dim=512),
      "head_dim must be value_dim=512 or a power of two from 16 to 256 more",
    ),
    *(
      (
        pages(128, dtype, num_pages=num_pages),
        "8-bit pages must take at most 2147483648 bytes or more than 4294967296 (scales not"
        f" counted), not {num_pages * 2**14}: take fewer or more pages",
      )
      for dtype, num_pages in (("int8", 2**17 + 1), ("float8_e4m3fn", 2**18))
    ),
  ],
)
def test_a_refusal_says_why(pages, why):
  assert why in gpu.refusal(pages, 16)
  with pytest.raises(NotImplementedError, match="'gpu' cannot serve this cache"):
    attention.choose("gpu", pages, 16)


@pytest.mark.parametrize("t", [1, 3, 16, 128])
def test_every_page_size_is_served(t):
  assert gpu.refusal(pages(64, "float16", t), 16) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("num_pages", [2**17, 2**18 + 1])
def test_8_bit_pages_beside_the_gap_are_served(dtype, num_pages):
  assert gpu.refusal(pages(128, dtype, num_pages=num_pages), 16) is None


@pytest.mark.parametrize(
  "capability, dtype, why",
  [
    ("7.5", "bfloat16", r"8\.0 or later, not 7\.5"),
    ("8.0", "bfloat16", None),
    ("8.9", "bfloat16", None),
    ("12.0", "bfloat16", None),
    ("8.0", "int8", None),
    ("8.6", "float8_e4m3fn", r"8\.9 or later for float8_e4m3fn, not 8\.6"),
    ("8.9", "float8_e4m3fn", None),
    ("9.0", "float8_e4m3fn", None),
  ],
)
def test_on_an_older_gpu_xla_is_chosen(capability, dtype, why, monkeypatch):
  """On a Hopper `gpu` serves 8 bits, which `hopper` refuses."""
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert attention.choose(None, pages(128, dtype), 16) == ("gpu" if why is None else "xla")
  if why is not None:
    with pytest.raises(NotImplementedError, match=why):
      attention.choose("gpu", pages(128, dtype), 16)


# What the compiler is given, without a GPU.


@dataclasses.dataclass(frozen=True)
class Shapes:
  """A step of a model over pages of which only the shapes exist."""

  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int
  options: tuple[tuple[str, float | None], ...] = (("softcap", None),)
  page_size: int = 16
  num_tokens: int = 32
  num_rows: int = 32
  parts: tuple[tuple[int, int], ...] | None = None
  num_pages: int = 4096
  num_layers: int = 32
  dtype: str = "bfloat16"
  kv_dtype: str = ""  # of pages, none: dtype
  value_dim: int | None = None

  def arguments(self):
    shape = jax.ShapeDtypeStruct
    b, s = self.num_tokens, self.num_rows
    config = CacheConfig(
      num_layers=self.num_layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
      value_dim=self.value_dim, page_size=self.page_size, num_pages=self.num_pages,
      dtype=self.kv_dtype or self.dtype,
    )  # fmt: skip
    lengths, tables = shape((s,), jnp.int32), shape((s, 8192 // self.page_size), jnp.int32)
    tables = Tables(tables, lengths, lengths, shape((s,), jnp.bool))
    rows = shape((b,), jnp.int32)
    pages = jax.eval_shape(functools.partial(pages_lib.init, config))
    plan = jax.eval_shape(
      functools.partial(cases.traced_plan, implementation="gpu", parts=self.parts),
      rows, rows, shape((b,), jnp.bool), pages, tables,
    )  # fmt: skip
    return (
      shape((b, self.num_heads, self.head_dim), self.dtype),
      pages,
      shape((), jnp.int32),
      tables,
      plan,
    )


LLAMA = Shapes("Llama-3-8B", 32, 8, 128)
MODELS = (
  LLAMA,
  Shapes("Qwen3-0.6B", 16, 8, 128),
  Shapes("Qwen3-32B", 64, 8, 128),
  Shapes("Gemma-2-9B", 16, 8, 256, (("softcap", 50.0), ("window", 4096))),
  Shapes("DeepSeek-V3", 128, 1, 576, value_dim=512),
)


def lower(shapes: Shapes, transform=lambda f: f) -> str:
  """The program for an H200, which is not there."""
  h200 = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
  mesh = jax.sharding.AbstractMesh(
    (1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=h200
  )
  attend = functools.partial(attention.attend, **dict(shapes.options))
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(transform(attend)).trace(*shapes.arguments())
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("num_tokens", [32, 2048])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_it_lowers_for_an_h200(model, page_size, num_tokens, monkeypatch):
  as_backend(monkeypatch)
  text = lower(dataclasses.replace(model, page_size=page_size, num_tokens=num_tokens))
  assert text.count("xla.gpu.triton") == 1


MIXED = dataclasses.replace(LLAMA, num_tokens=32 + 512, parts=((32, 32), (512, 8)))


def test_parts_have_a_launch_each_and_no_other_work_on_the_plan(monkeypatch):
  """Rows that decode: a program for each token and KV head. Prompts: large tiles of 64-token blocks.

  32,512 = 32 * 8 programs of 16 queries, and (512 + 8 * 63) // 64 blocks of two tiles of 128.
  """
  as_backend(monkeypatch)
  text = lower(MIXED)
  assert text.count("xla.gpu.triton") == 2
  found = re.findall(r"grid_x = (\d+) : i32, grid_y = (\d+) : i32, grid_z = (\d+)", text)
  assert found == [("32", "8", "1"), ("30", "8", "1")]
  assert not re.search(r"stablehlo\.(gather|scatter|dynamic_gather|reduce_window|while)", text)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_lower_for_an_h200(dtype, monkeypatch):
  as_backend(monkeypatch)
  for num_tokens in (32, 2048):
    lower(dataclasses.replace(LLAMA, dtype=dtype, num_tokens=num_tokens))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_8_bits_lower_for_an_h200(model, kv_dtype, dtype, monkeypatch):
  as_backend(monkeypatch)
  for num_tokens in (32, 2048):
    shapes = dataclasses.replace(model, dtype=dtype, kv_dtype=kv_dtype, num_tokens=num_tokens)
    assert lower(shapes).count("xla.gpu.triton") == 1


GIB = 2**30
PAGE_CHANNELS = 32 * 8 * 16 * 256


def offset_bits(shapes: Shapes, monkeypatch) -> set[int]:
  """Bits of the offsets of keys and values in the Triton module of `lower(shapes)`."""
  modules = []
  real = lowering.lower_jaxpr_to_triton_module

  def spy(*args, **kwargs):
    result = real(*args, **kwargs)
    modules.append(str(result.module))
    return result

  monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", spy)
  as_backend(monkeypatch)
  lower(shapes)
  [module] = modules
  name = {"int8": "i8", "float8_e4m3fn": "f8E4M3FN"}.get(shapes.kv_dtype, "bf16")
  pointers = rf"tt\.addptr .*tensor<64x(?:64|128)x!tt\.ptr<{name}>>, tensor<64x(?:64|128)xi(\d+)>"
  return {int(bits) for bits in re.findall(pointers, module)}


@pytest.mark.parametrize(
  "kv_dtype, num_bytes, bits",
  [
    ("bfloat16", GIB, 32),
    ("bfloat16", 4 * GIB, 32),
    ("bfloat16", 4 * GIB + 1, 64),
    ("bfloat16", 70 * GIB, 64),
    ("int8", 2 * GIB, 32),
    ("int8", 4 * GIB + 1, 64),
    ("float8_e4m3fn", 2 * GIB, 32),
    ("float8_e4m3fn", 4 * GIB + 1, 64),
  ],
)
def test_offsets_into_the_pages_never_overflow(kv_dtype, num_bytes, bits, monkeypatch):
  """Offsets count elements: 2**31 are 4 GiB of 16 bits and 2 GiB of 8; beyond 4 GiB they have 64 bits."""
  page_bytes = PAGE_CHANNELS * np.dtype(kv_dtype).itemsize
  shapes = dataclasses.replace(LLAMA, kv_dtype=kv_dtype, num_pages=-(-num_bytes // page_bytes))
  assert gpu.refusal(shapes.arguments()[1], 16) is None
  assert offset_bits(shapes, monkeypatch) == {bits}


@pytest.mark.parametrize("num_pages", [2 * GIB // PAGE_CHANNELS + 1, 4 * GIB // PAGE_CHANNELS])
def test_8_bit_pages_whose_offsets_overflow_are_refused(num_pages, monkeypatch):
  shapes = dataclasses.replace(LLAMA, kv_dtype="int8", num_pages=num_pages)
  assert offset_bits(shapes, monkeypatch) == {32}
  assert "take fewer or more pages" in (gpu.refusal(shapes.arguments()[1], 16) or "")
