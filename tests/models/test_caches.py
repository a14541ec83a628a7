"""Groups of layers, and how much memory each of their caches gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import models
from paged_jax.ledger import HostLedger
from paged_jax.models import families

RAW = {"model_type": "gemma3_text", "num_hidden_layers": 26, "num_attention_heads": 4}
RAW |= {"num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "hidden_size": 1152}
GEMMA3 = families.read(RAW)  # a Gemma 3 1B
MISTRAL = families.read({"model_type": "mistral", "sliding_window": 64})
SIZES = {"num_rows": 8, "page_size": 16, "max_length": 8192}
PER_ROW, STEP = (
  33,
  64,
)  # pages: 511 tokens and one more, anyhow aligned, and twice 512 prompt tokens


def bytes_of(cache):
  """Bytes of a cache's pool, as this platform stores it."""
  return cache.num_pages * cache.stored_for(jax.default_backend()).page_bytes


def test_groups_are_layers_of_one_window_and_all_tokens_come_first():
  full, window = GEMMA3.groups
  assert (full.window, full.layers) == (None, (5, 11, 17, 23))
  assert window.window == 512 and sorted(full.layers + window.layers) == list(range(26))
  assert (window.num_kv_heads, window.head_dim) == (1, 256)


def test_longer_windows_come_before_shorter_ones():
  config = dataclasses.replace(GEMMA3, windows=(8, 4, None, 6) * 6 + (4, 6))
  assert [group.window for group in config.groups] == [None, 8, 6, 4]


def test_model_whose_layers_are_alike_has_one_group_and_one_cache():
  assert len(MISTRAL.groups) == 1
  cache = models.cache_config(MISTRAL, num_pages=8, num_rows=2)
  assert (cache.num_layers, cache.num_pages) == (32, 8)


def test_pool_of_a_window_is_for_rows_prefixes_and_the_prompts_of_a_step():
  full, window = models.cache_config(GEMMA3, num_pages=4096, **SIZES)
  assert (full.num_layers, full.num_pages) == (4, 4096)
  assert (window.num_layers, window.num_pages) == (22, 16 * PER_ROW + STEP)
  _, window = models.cache_config(GEMMA3, num_pages=4096, prefix_ends=0, step_tokens=0, **SIZES)
  assert window.num_pages == 8 * PER_ROW


def test_pool_of_a_window_is_never_larger_than_that_of_all_tokens():
  assert [c.num_pages for c in models.cache_config(GEMMA3, num_pages=40, **SIZES)] == [40, 40]
  short = SIZES | {"max_length": 64}  # rows end before the window does
  _, window = models.cache_config(GEMMA3, num_pages=4096, **short)
  assert window.num_pages == 16 * 4 + STEP


@pytest.mark.parametrize("memory", [2**27, 2**28, 2**30, 10**10])
def test_pools_fill_the_memory_and_no_more(memory):
  full, window = models.cache_config(GEMMA3, memory_bytes=memory, **SIZES)
  used = bytes_of(full) + bytes_of(window)
  assert memory - bytes_of(dataclasses.replace(full, num_pages=1)) < used <= memory
  assert full.num_pages >= full.pages_per_row and window.num_pages >= PER_ROW + STEP


def test_little_memory_is_for_one_whole_row_first():
  full, window = (
    dataclasses.replace(c, num_pages=1) for c in models.cache_config(GEMMA3, num_pages=1, **SIZES)
  )
  least = 512 * bytes_of(full) + (PER_ROW + STEP) * bytes_of(window)
  for more, rows in ((0, 1), (PER_ROW * bytes_of(window), 2), (3 * PER_ROW * bytes_of(window), 4)):
    caches = models.cache_config(GEMMA3, memory_bytes=least + more, **SIZES)
    assert [c.num_pages for c in caches] == [512, rows * PER_ROW + STEP]
  message = f"memory_bytes={least - 1} is too small for one row of 8192 tokens, which takes {least}"
  with pytest.raises(ValueError, match=message):
    models.cache_config(GEMMA3, memory_bytes=least - 1, **SIZES)


def test_memory_of_a_model_of_one_group_is_all_its_own():
  cache = models.cache_config(MISTRAL, memory_bytes=2**28, num_rows=2, max_length=256)
  assert bytes_of(cache) == 2**28
  cache = models.cache_config(GEMMA3, memory_bytes=2**28, uniform=True, **SIZES)
  assert cache.num_layers == 26 and 0 <= 2**28 - bytes_of(cache) < bytes_of(cache)


def test_memory_is_counted_as_this_platform_stores_it(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  odd = families.read({"model_type": "llama", "head_dim": 80, "num_hidden_layers": 2})
  cache = models.cache_config(odd, memory_bytes=2**28, num_rows=1)
  stored = cache.stored_for("gpu")
  assert stored.array_head_dim == 128 and stored.num_pages * stored.page_bytes <= 2**28


def test_pool_has_no_more_pages_than_a_cache_may():
  cache = models.cache_config(MISTRAL, memory_bytes=10**17, num_rows=2, dtype=jnp.float32)
  assert cache.num_pages * cache.page_size == 2**30 - 16


@pytest.mark.parametrize("given", [{}, {"num_pages": 4, "memory_bytes": 4}], ids=str)
def test_pages_or_memory_must_be_given(given):
  with pytest.raises(ValueError, match="give num_pages or memory_bytes, got num_pages="):
    models.cache_config(GEMMA3, num_rows=1, **given)


def test_caches_have_the_windows_of_their_groups():
  assert [c.window for c in models.cache_config(GEMMA3, num_pages=4096, **SIZES)] == [None, 512]
  assert models.cache_config(MISTRAL, num_pages=8, num_rows=2).window == 64
  assert models.cache_config(MISTRAL, num_pages=8, num_rows=2, uniform=True).window is None


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [1, 2, 17])
def test_bound_of_a_window_is_what_rows_hold_in_the_worst_case(window, page_size):
  config = dataclasses.replace(GEMMA3, windows=(None, window) * 13)
  sizes = {"num_rows": 3, "page_size": page_size, "max_length": 96, "num_pages": 500}
  bound = models.cache_config(config, step_tokens=12, prefix_ends=0, **sizes)[
    1
  ].num_pages  # twice 12
  large = dataclasses.replace(models.cache_config(config, **sizes)[1], num_pages=500)
  ledger = HostLedger(large)
  most = 0
  for counts in [[1, 1, 1]] * 9 + [[24, 1, 1], [1, 13, 11], [1, 1, 24]] + [[1, 1, 1]] * 20:
    info = ledger.extend(np.int32(counts))
    assert info.ok.all()
    most = max(most, 500 - int(info.num_free))
  assert bound - 4 <= most <= bound


def test_description_has_a_line_per_cache():
  full, window = models.describe(models.cache_config(GEMMA3, num_pages=4096, **SIZES)).splitlines()
  assert full.startswith("4 layers, all 8,192 tokens of a row in bfloat16: 4,096 pages")
  assert window.startswith("22 layers, the last 512 tokens of a row in bfloat16: 592 pages")


def test_each_group_may_have_a_dtype_of_its_own():
  full, window = models.cache_config(GEMMA3, num_pages=64, dtype=("int8", "bfloat16"), **SIZES)
  assert (full.dtype, window.dtype) == (jnp.int8, jnp.bfloat16)
  with pytest.raises(ValueError, match="dtype must be one, or one for each of 2 groups, got"):
    models.cache_config(GEMMA3, num_pages=64, dtype=("int8",), **SIZES)


@pytest.mark.parametrize(
  ("platform", "dtype", "size"),
  [("cpu", "int8", 16), ("tpu", "bfloat16", 16), ("tpu", "int8", 128), ("gpu", "int8", 16)],
)
def test_pages_of_8_bits_are_large_on_tpu_by_default(monkeypatch, platform, dtype, size):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert models.cache_config(MISTRAL, num_pages=64, num_rows=1, dtype=dtype).page_size == size
