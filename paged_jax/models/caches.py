"""The caches that a model needs, and how they share a memory budget."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paged_jax import cache as cache_lib
from paged_jax import quantization
from paged_jax.config import CacheConfig
from paged_jax.models.config import DecoderConfig, Group

MAX_TOKENS = 2**30 - 1  # in a pool, see `CacheConfig`


def cache_config(
  config: DecoderConfig, *, num_rows: int, num_pages: int | None = None,
  memory_bytes: int | None = None, page_size: int | None = None, max_length: int | None = None,
  dtype: Any = jnp.bfloat16, step_tokens: int = 512, prefix_ends: int | None = None,
  uniform: bool = False,
) -> Any:  # fmt: skip
  """A `CacheConfig` for this model, or a tuple of them if its layers are several groups.

  A row holds few pages of a group with a window, so the group's pool has a bound:

      # num_rows    x (ceil((window - 1) / page_size) + 1)    what the rows hold
      # prefix_ends x (ceil((window - 1) / page_size) + 1)    what the prefix cache keeps
      #         + 2 x ceil(step_tokens / page_size)           the prompts of one step, and of the last
      #                                                      one: a row gives up pages when it grows

  The groups with the longest window, or with none, get `num_pages`, or all that is left of
  `memory_bytes`. If that is less than one row of `max_length` tokens, the other groups get less
  than their bound.

  Args:
    config: The model.
    num_rows: Sequences that run at once.
    num_pages: Pages of the groups with the longest window.
    memory_bytes: Bytes of all pools together, as this platform stores them, instead of `num_pages`.
    page_size: Tokens per page; see `default_page_size`.
    max_length: Most tokens of a row; by default the longest text of the model.
    dtype: Of keys and values: float32, bfloat16, float16, int8 or float8_e4m3fn; or a tuple, one
      for each group in the order of `config.groups`.
    step_tokens: Most tokens that a step adds, one per row not counted: the largest of the engine's
      `prompt_sizes`, and the drafts of all rows.
    prefix_ends: Ends of prefixes whose windows the prefix cache can keep; by default `num_rows`, and
      with `memory_bytes` as many as a quarter of it holds that rows leave, if these are more.
    uniform: One cache for all layers, which keeps all tokens.

  Raises:
    ValueError: Both or none of `num_pages` and `memory_bytes` are given. The memory is too small
      for one row. `max_length` is above the length where a `dynamic` or `longrope` scaling begins:
      from there on keys turn by the length of the whole text, and those in a cache do not.

  >>> import dataclasses
  >>> from paged_jax import models
  >>> config = models.load(models.embedded()).config
  >>> models.cache_config(config, num_pages=64, num_rows=4).max_length
  512
  >>> config = dataclasses.replace(config, windows=(32, 32, 32, None))
  >>> sizes = dict(num_rows=4, dtype="float32", step_tokens=32)
  >>> [cache.num_pages for cache in models.cache_config(config, memory_bytes=2**21, **sizes)]
  [172, 28]
  """
  if (num_pages is None) == (memory_bytes is None):
    raise ValueError(f"give num_pages or memory_bytes, got {num_pages=} and {memory_bytes=}")
  max_length = config.max_length if max_length is None else max_length
  _check_ropes(config, max_length)
  groups = (config.uniform,) if uniform else config.groups
  dtypes = tuple(dtype) if isinstance(dtype, tuple | list) else (dtype,) * len(groups)
  if len(dtypes) != len(groups):
    raise ValueError(f"dtype must be one, or one for each of {len(groups)} groups, got {dtype}")
  page_size = default_page_size(*dtypes) if page_size is None else page_size
  caches = [
    CacheConfig(
      num_layers=len(group.layers), num_kv_heads=group.num_kv_heads, head_dim=group.head_dim,
      page_size=page_size, num_pages=num_pages or 1, num_rows=num_rows, max_length=max_length,
      dtype=jnp.dtype(own), value_dim=group.value_dim, window=group.window,
    )
    for group, own in zip(groups, dtypes)
  ]  # fmt: skip
  if len(groups) > 1 or memory_bytes is not None:
    pages = _split(groups, caches, prefix_ends, step_tokens, num_pages, memory_bytes)
    caches = [dataclasses.replace(each, num_pages=n) for each, n in zip(caches, pages)]
  return caches[0] if len(caches) == 1 else tuple(caches)


def default_page_size(*dtypes: Any) -> int:
  """Tokens per page: 16, or 128 on TPU if pages of 8 bits are among `dtypes`.

  There the scales of fewer tokens do not fill the lanes (`paged_jax.attention.tpu_limits`).

  >>> from paged_jax import models
  >>> models.default_page_size("bfloat16")
  16
  """
  return 128 if jax.default_backend() == "tpu" and any(map(quantization.quantized, dtypes)) else 16


def describe(caches: CacheConfig | Sequence[CacheConfig]) -> str:
  """What `cache_config` has decided: a line per cache, to be printed.

  >>> import dataclasses
  >>> from paged_jax import models
  >>> config = models.load(models.embedded()).config
  >>> config = dataclasses.replace(config, windows=(32, 32, 32, None))
  >>> sizes = dict(num_rows=4, dtype="float32", step_tokens=32)
  >>> print(models.describe(models.cache_config(config, memory_bytes=2**21, **sizes)))
  1 layer, all 512 tokens of a row in float32: 172 pages of 8,192 bytes, 1.4 MB (67%)
  3 layers, the last 32 tokens of a row in float32: 28 pages of 24,576 bytes, 0.7 MB (33%)
  """
  caches = [caches] if isinstance(caches, CacheConfig) else caches
  sizes = [cache.num_pages * page for cache, page in zip(caches, _page_bytes(caches))]
  lines = []
  for cache, size in zip(caches, sizes):
    layers = f"{cache.num_layers} layer{'s' if cache.num_layers > 1 else ''}"
    kept = f"all {cache.max_length:,}" if cache.window is None else f"the last {cache.window:,}"
    lines.append(
      f"{layers}, {kept} tokens of a row in {cache.dtype}: {cache.num_pages:,} pages of"
      f" {size // cache.num_pages:,} bytes, {size / 1e6:,.1f} MB ({size / sum(sizes):.0%})"
    )
  return "\n".join(lines)


def _split(
  groups: Sequence[Group], caches: Sequence[CacheConfig], prefix_ends: int | None, step_tokens: int,
  num_pages: int | None, memory_bytes: int | None,
) -> list[int]:  # fmt: skip
  """Pages of each group's pool."""
  size, most, num_rows = caches[0].page_size, caches[0].pages_per_row, caches[0].num_rows
  num_windows = num_rows + (num_rows if prefix_ends is None else prefix_ends)
  windows = [group.window for group in groups]
  row = [most if w is None else min(most, -(-(w - 1) // size) + 1) for w in windows]
  step = [0 if w is None else 2 * -(-step_tokens // size) for w in windows]
  longest = [w == windows[0] for w in windows]
  if memory_bytes is not None:
    page_bytes = _page_bytes(caches)
    needed = sum(b * (r + s) for b, r, s in zip(page_bytes, row, step))
    if needed > memory_bytes:
      raise ValueError(
        f"{memory_bytes=} is too small for one row of {caches[0].max_length} tokens, which takes"
        f" {needed} bytes"
      )
    spare = memory_bytes - needed  # beyond one row
    window_bytes = sum(b * r for b, r, long in zip(page_bytes, row, longest) if not long)
    if window_bytes:
      if prefix_ends is None:
        num_windows = num_rows + max(num_rows, (spare // window_bytes - num_rows) // 4)
      num_windows = min(num_windows, 1 + spare // window_bytes)
      spare -= (num_windows - 1) * window_bytes
    num_pages = row[0] + step[0] + spare // sum(b for b, long in zip(page_bytes, longest) if long)
  assert num_pages is not None
  num_pages = min(num_pages, MAX_TOKENS // size)
  return [
    num_pages if long else min(num_pages, num_windows * r + s)
    for r, s, long in zip(row, step, longest)
  ]


def _page_bytes(caches: Sequence[CacheConfig]) -> list[int]:
  """Bytes of a page of each cache, as this platform stores it."""
  return [cache.page_bytes for cache in cache_lib.stored(tuple(caches))]


def _check_ropes(config: DecoderConfig, max_length: int) -> None:
  """Raises if keys of a text of `max_length` tokens would turn by its length."""
  for rope in config.ropes:
    if rope.max_length and max_length > rope.max_length:
      raise ValueError(
        f"max_length must be at most {rope.max_length} with rope scaling {rope.scaling!r},"
        f" got {max_length}"
      )
