"""One static scale for all keys of a layer, against one per token and head, for `eightbit.py`."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from eightbit_cost import EIGHT, FORMATS

import paged_jax
from paged_jax import cache as cache_lib
from paged_jax import quantization

LARGE = 64  # a power of two rounds nothing


@contextlib.contextmanager
def per_tensor(scales: Any, rounded: str | None):
  """Inside, `write` rounds keys and values as pages of dtype `rounded` would with these `scales`.

  `scales`: by the number of a cache's layers those of keys and of values, f32[L] each.
  """
  write = cache_lib.write

  def rounding(cache, layer, k, v, plan):
    pairs = zip((k, v), scales[cache.pages.kv.shape[1]])
    k, v = (fixed(x, scale[layer], rounded) for x, scale in pairs)
    return write(cache, layer, k, v, plan)

  if rounded is not None:
    cache_lib.write = rounding
  try:
    yield
  finally:
    cache_lib.write = write


def fixed(x: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
  """`x`, rounded to numbers of `dtype` times one scale; too large ones to the largest."""
  limit = quantization.LIMITS[dtype]
  numbers = jnp.clip(x.astype(jnp.float32) / scale, -limit, limit)
  numbers = jnp.round(numbers) if dtype == "int8" else numbers
  return (numbers.astype(dtype).astype(jnp.float32) * scale).astype(x.dtype)


def attention_errors() -> tuple[list[dict], dict]:
  """Errors of attention in the shape of a Qwen2-7B's layer."""
  length, heads, dim, queries = 1024, 4, 128, 28
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.standard_normal((length, n, dim), np.float32) for n in (queries, heads, heads)
  )  # fmt: skip
  top = float(LARGE)

  @functools.partial(jax.jit, static_argnames="dtype")
  def run(q, k, v, dtype):
    cache = paged_jax.init(
      paged_jax.CacheConfig(1, heads, dim, num_pages=64, num_rows=1, max_length=length, dtype=dtype)
    )
    cache, _ = paged_jax.extend(cache, jnp.array([length]))
    plan = paged_jax.plan(cache, jnp.zeros(length, jnp.int32), jnp.arange(length))
    return paged_jax.attend(paged_jax.write(cache, 0, k, v, plan), 0, q, plan)

  rows, summary = [], {}
  for what in ("nothing", "channel", "token", "head"):
    own_q, own_k, own_v = q.copy(), k.copy(), v.copy()
    if what == "channel":
      own_k[..., 5] *= top
      own_q[..., 5] /= top
    if what == "token":
      own_v[0] *= top
    if what == "head":
      own_k[:, 0] *= top
      own_v[:, 0] *= top
      own_q[:, : queries // heads] /= top
    exact = run(own_q, own_k, own_v, "float32")
    if what != "token":  # whose value would be most of its row's outputs
      size = np.linalg.norm(exact, axis=(0, 2))  # [Q]
    outs = {name: run(own_q, own_k, own_v, dtype) for name, dtype in FORMATS.items()}
    for name, dtype in EIGHT.items():
      k_v = (fixed(x, np.abs(x).max() / quantization.LIMITS[dtype], dtype) for x in (own_k, own_v))
      outs[f"{name}, per tensor"] = run(own_q, *k_v, "float32")
    for name, out in outs.items():
      error = np.linalg.norm(out - exact, axis=(0, 2))  # [Q]
      error = float(np.mean(error / size))  # a head with large values counts as much as others
      label = "no outlier" if what == "nothing" else f"one {what} 64 times as large"
      rows.append({"what": f"attention, {label}", "pages": name, "error": error})
      if name != "bf16" and what != "nothing":
        summary[f"attention_{what}_{name.replace(', ', '_').replace(' ', '_')}"] = error
  return rows, summary
