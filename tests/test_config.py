import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax import CacheConfig


def test_defaults_are_the_seeds():
  config = CacheConfig()
  assert (config.page_size, config.num_pages, config.num_layers) == (16, 1024, 32)
  assert (config.num_kv_heads, config.head_dim, config.copy_on_write) == (32, 128, True)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "8"])
@pytest.mark.parametrize(
  "field",
  ["num_layers", "num_kv_heads", "head_dim", "page_size", "num_pages", "num_rows", "max_length"],
)
def test_a_size_that_is_not_a_positive_integer_is_named(field, value):
  with pytest.raises(ValueError, match=f"{field}.*{value}"):
    CacheConfig(**{field: value})


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("dtype", "int32", "dtype.*int32"),
    ("dtype", "float8_e5m2", "dtype.*float8_e5m2"),
    ("dtype", "nonsense", "dtype.*nonsense"),
    ("dtype", None, "dtype.*None"),
    ("storage_dtype", "float32", "storage_dtype.*float32"),
    ("storage_head_dim", 127, "storage_head_dim.*128.*127"),
    ("storage_head_dim", 256.0, "storage_head_dim.*256.0"),
    ("value_dim", 0, "value_dim.*128.*0"),
    ("value_dim", -1, "value_dim.*128.*-1"),
    ("value_dim", 129, "value_dim.*128.*129"),
    ("value_dim", 64.0, "value_dim.*64.0"),
    ("value_dim", True, "value_dim.*True"),
    ("copy_on_write", 1, "copy_on_write.*1"),
    ("num_pages", 2**27, "num_pages.*2147483648"),
    ("max_length", 2**30, "max_length.*1073741824"),
    ("num_rows", 2**22, "num_rows.*1073741824"),
  ],
)
def test_a_field_out_of_range_is_named_with_its_value(field, value, message):
  with pytest.raises(ValueError, match=message):
    CacheConfig(**{field: value})


def test_configs_are_hashable_and_equal_by_value():
  assert CacheConfig(num_pages=np.int64(8)) == CacheConfig(num_pages=8)
  assert hash(CacheConfig(dtype="float32")) == hash(CacheConfig(dtype=jnp.float32))
  with pytest.raises(dataclasses.FrozenInstanceError):
    CacheConfig().num_pages = 1  # pyright: ignore


def test_storage_is_that_of_a_platform_unless_the_config_says_how():
  config = CacheConfig(dtype="bfloat16", head_dim=80)
  assert config.array_dtype == jnp.bfloat16
  assert config.stored_for("gpu").array_dtype == jnp.bfloat16
  assert config.stored_for("cpu").array_dtype in (jnp.bfloat16, jnp.uint16)
  assert CacheConfig(dtype="float32").stored_for("cpu").array_dtype == jnp.float32
  bits = dataclasses.replace(config, storage_dtype="uint16", storage_head_dim=80)
  for stored in (bits, config.stored_for("gpu")):
    assert [stored.stored_for(platform) for platform in ("cpu", "gpu", "tpu")] == [stored] * 3


@pytest.mark.parametrize(("dtype", "share"), [("int8", 33 / 64), ("float8_e4m3fn", 33 / 64)])
def test_bytes_of_8_bit_pages_count_their_scales(dtype, share):
  config = CacheConfig(head_dim=128, dtype=dtype)
  assert config.page_bytes == share * CacheConfig(head_dim=128).page_bytes
  cache = paged_jax.init(config_ := CacheConfig(1, 2, 4, 8, 16, 2, 16, dtype=dtype))
  assert sum(x.nbytes for x in jax.tree.leaves(cache.pages)) == 16 * config_.page_bytes
  assert config.value_dtype == jnp.float32 and config.num_scales == 64
  assert dataclasses.replace(config, value_dim=64).num_scales == 32


@pytest.mark.parametrize(
  ("platform", "sizes"),
  [
    ("cpu", {5: 5, 80: 80}),
    ("tpu", {8: 64, 64: 64, 80: 128, 96: 128, 112: 128, 120: 128, 128: 128, 192: 192, 576: 576}),
    ("gpu", {5: 16, 32: 32, 80: 128, 96: 128, 112: 128, 120: 128, 192: 256, 256: 256, 576: 576}),
  ],
)
def test_head_dims_are_stored_as_a_kernel_of_the_platform_serves_them(platform, sizes):
  stored = {d: CacheConfig(head_dim=d).stored_for(platform).array_head_dim for d in sizes}
  assert stored == sizes


@pytest.mark.parametrize(
  ("platform", "sizes"),
  [("cpu", {(24, 16): 24}), ("tpu", {(24, 16): 128, (576, 512): 640, (640, 512): 640}),
   ("gpu", {(24, 16): 32, (576, 512): 576, (560, 512): 576, (512, 512): 512, (900, 512): 900})],
)  # fmt: skip
def test_keys_that_contain_values_are_stored_as_a_kernel_serves_them(platform, sizes):
  configs = {(d, v): CacheConfig(head_dim=d, value_dim=v).stored_for(platform) for d, v in sizes}
  assert {dims: config.array_head_dim for dims, config in configs.items()} == sizes


def test_a_padded_page_has_the_bytes_of_what_is_stored():
  config = CacheConfig(head_dim=80, storage_head_dim=np.int64(128))
  assert config.page_bytes == CacheConfig(head_dim=128).page_bytes
  assert hash(config.stored_for("tpu")) == hash(CacheConfig(head_dim=80).stored_for("tpu"))


def test_a_page_of_keys_alone_has_their_bytes():
  fields = dict(num_layers=3, num_kv_heads=1, head_dim=576, page_size=64, value_dim=np.int64(512))
  config = CacheConfig(**fields)
  assert config.page_bytes == 3 * 64 * 576 * 2 and type(config.value_dim) is int
  assert config.stored_for("tpu").page_bytes == 3 * 64 * 640 * 2  # 1,280 bytes per token, not 2,304
  assert hash(config) == hash(CacheConfig(**fields))


def test_a_one_page_cache_can_be_described():
  assert CacheConfig(num_pages=1, page_size=1, max_length=1).pages_per_row == 1
