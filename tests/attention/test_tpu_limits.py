"""What the TPU kernels refuse and why, and that what just fits is served."""

import contextlib

import cases
import jax
import pytest

import paged_jax
from paged_jax import attention


def stored(**fields):
  """Pages of 8 KV heads, as shapes, and how many a row has."""
  small = dict(num_layers=2, num_kv_heads=8, page_size=16, num_pages=4, num_rows=1)
  config = paged_jax.CacheConfig(**small | fields)
  return jax.eval_shape(lambda: paged_jax.init(config)).pages, config.pages_per_row


def on(kind):
  """As if programs were for this TPU, if it is one."""
  if not kind:
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
  axes = dict(axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("model",), **axes))


MIB = 2**20


@pytest.mark.parametrize(
  "why, fields, kind",
  [
    ("page_size must be a multiple of 16 for bfloat16, not 8", dict(page_size=8), ""),
    ("head_dim must be a multiple of 64, not 80: CacheConfig.stored_for pads it",
     dict(head_dim=80), ""),
    ("head_dim must be a multiple of 128, not 576: CacheConfig.stored_for pads it",
     dict(head_dim=576, value_dim=512), ""),
    ("kept as float32, bfloat16, int8 or float8_e4m3fn, not float16", dict(dtype="float16"), ""),
    ("kept as float32, bfloat16, int8 or float8_e4m3fn, not uint16",
     dict(storage_dtype="uint16"), ""),
    ("kept as float32, bfloat16, int8 or float8_e4m3fn, not uint8",
     dict(dtype="int8", storage_dtype="uint8", page_size=128), ""),
    ("page_size must be a multiple of 128 for int8, not 64: .*take page_size=128",
     dict(dtype="int8", page_size=64), ""),
    ("page_size must be a multiple of 128 for float8_e4m3fn, not 192: .*take page_size=128",
     dict(dtype="float8_e4m3fn", page_size=192), ""),
    (f"at most {12 * MIB} bytes, .* not {8192 * 8 * (256 + 8)}: take smaller pages",
     dict(dtype="int8", page_size=8192), ""),
    ("a row must have at most 65536 pages, whose ids fit in SMEM, not 65537: take larger pages",
     dict(max_length=2**20 + 1), ""),
    (f"at most {12 * MIB} bytes, .* not {16 * MIB}: take smaller pages", dict(page_size=4096), ""),
    (f"at most {14 * MIB // 4} bytes, .* not {4 * MIB}: take smaller pages", dict(page_size=1024),
     "TPU v4"),
    (f"at most {12 * MIB} bytes, .* not {16 * MIB}: take smaller pages", dict(page_size=4096),
     "TPU7x"),
    (f"at most {12 * MIB} bytes, .* not {16 * MIB}: take smaller pages", dict(page_size=4096),
     "TPU v6 lite"),
    ("the TPU must be v4 or later, not v3", {}, "TPU v3"),
  ],
)  # fmt: skip
def test_the_tpu_kernel_says_why_it_refuses(why, fields, kind):
  refused = pytest.raises(NotImplementedError, match=f"'tpu' cannot serve this cache: .*{why}")
  with on(kind), refused:
    attention.choose("tpu", *stored(**fields))


@pytest.mark.parametrize(
  "fields, kind",
  [
    (dict(head_dim=80, storage_head_dim=128), ""),
    (dict(head_dim=576, storage_head_dim=640, value_dim=512), ""),
    (dict(head_dim=128, value_dim=5, page_size=6144), ""),
    (dict(max_length=2**20), ""),
    (dict(page_size=3072), ""),
    (dict(page_size=768), "TPU v4"),
    (dict(page_size=3072), "TPU7x"),
    (dict(page_size=3072), "TPU v6 lite"),
    (dict(dtype="int8", page_size=128), ""),
    (dict(dtype="float8_e4m3fn", page_size=128, num_kv_heads=1), ""),
    (dict(dtype="int8", page_size=128, num_kv_heads=1, head_dim=640, value_dim=512), ""),
    (dict(dtype="int8", page_size=5888), ""),
  ],
)
def test_the_tpu_kernel_serves_what_just_fits(fields, kind):
  with on(kind):
    assert attention.choose("tpu", *stored(**fields)) == "tpu"


@pytest.mark.parametrize("kind, size", [("", 64), ("TPU v4", 16), ("TPU v5p", 64)])
def test_blocks_of_prompts_are_small_where_vmem_is(kind, size):
  p = cases.build(cases.Case("", (70,), (70,), spare_rows=0))
  tokens = p.plan.rows, p.plan.positions, p.plan.slots, p.plan.ok, p.pages, p.tables
  with on(kind):
    (part,) = attention.cut("tpu", *tokens, None)
  assert part.block_size == size


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 8), (70, 16)])
def test_blocks_are_small_where_all_query_heads_share_a_key(count, size):
  p = cases.build(cases.Case("", (70,), (count,), value_dim=4, spare_rows=0))
  tokens = p.plan.rows, p.plan.positions, p.plan.slots, p.plan.ok, p.pages, p.tables
  for implementation in ("xla", "tpu", "gpu"):
    (part,) = attention.cut(implementation, *tokens, ((count, 1),))
    assert part.block_size == (count if (implementation, count) == ("xla", 5) else size)


@pytest.mark.parametrize(
  "implementation, platform, head_dims",
  [("tpu", "tpu", (5, 64, 80, 96, 112, 120, 192, 576)), ("gpu", "gpu", (5, 16, 80, 96, 120, 192))],
)
def test_a_cache_stored_for_a_platform_has_a_head_dim_that_its_kernel_serves(
  implementation, platform, head_dims
):
  for head_dim in head_dims:
    pages, per_row = stored(head_dim=head_dim)
    wide, _ = stored(
      head_dim=head_dim,
      storage_head_dim=paged_jax.CacheConfig(head_dim=head_dim).stored_for(platform).array_head_dim,
    )
    assert attention.refusal(implementation, wide, per_row) is None
    served = attention.refusal(implementation, pages, per_row) is None
    assert served == (wide.kv.shape == pages.kv.shape)
