"""What 8-bit pages cost and save beside bfloat16, for `eightbit.py`. All ratios are over bfloat16.

`bytes_per_token_*_d128`: of a cache with heads of 128, as this platform stores it; `..._d64` and so on.

`requests_at_once_*`: most requests at once, and `running_*` the mean while others wait, in a run of the
engine in one memory budget, heads of 128. Requests have the lengths of Azure's 2023 conversations,
times 6 and over 16, a page has 4 tokens, and a call computes up to 1,024 tokens of prompts: fewer
would not fill the memory before the first requests end.

`decode_*_vs_bf16_cpu`: time of `attend` for 8 rows that decode, 32 queries, 8 heads of 128, queries in
bfloat16, at 2,048 tokens; `..._512`, `..._8k`. The median of pairs, in turns.

`write_*_vs_bf16_cpu`: time of `write` of 8 rows' tokens; `..._prompt` of 512 tokens of one row. The same
number of layers (32) is written each time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import lengths
import measure
import numpy as np
from flax import nnx
from simulation import SCALE

import paged_jax
from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.host import ManagerConfig
from paged_jax.models import families

PARTS = ("bytes", "engine", "decode", "write")
EIGHT = {"int8": "int8", "fp8": "float8_e4m3fn"}
FORMATS = {"bf16": "bfloat16", **EIGHT}
Q, H, D, T, ROWS = 32, 8, 128, 16, 8
PROMPTS = 1024  # tokens of prompts in a call: enough to fill the memory


def stored(caches):
  """The same caches, as this platform stores them."""
  each = [x.stored_for(jax.default_backend()) for x in paged_jax.groups.each(caches)]
  return paged_jax.groups.like(caches, each)


def bytes_of_tokens() -> tuple[list[dict], dict]:
  rows, summary = [], {}
  for dim in (64, 128, 256):
    configs = {
      name: stored(paged_jax.CacheConfig(1, H, dim, dtype=dtype)) for name, dtype in FORMATS.items()
    }
    base = configs["bf16"].page_bytes
    for name, config in configs.items():
      per_token = config.page_bytes // config.page_size
      ratio = config.page_bytes / base
      rows.append({"what": f"token, heads of {dim}", "pages": name, "bytes": per_token,
                   "over bf16": ratio})  # fmt: skip
      if name in EIGHT:
        summary[f"bytes_per_token_{name}_d{dim}"] = ratio
  return rows, summary


# Requests at once


def at_once(dtype: str, work, num_rows: int, memory_bytes: int, longest: int) -> dict:
  """Requests that run at once; all are there at the start."""
  config = families.read(
    {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    | {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": D}
    | {"max_position_embeddings": longest}
  )
  caches = models.cache_config(
    config, memory_bytes=memory_bytes, num_rows=num_rows, page_size=4, dtype=dtype, step_tokens=PROMPTS,
  )  # fmt: skip
  options = ManagerConfig(num_host_pages=0, swapping=False, prefix_cache=False)
  engine = Engine(
    models.Decoder(config, rngs=nnx.Rngs(0)),
    EngineConfig(stored(caches), options, prompt_sizes=(PROMPTS,), preemption="recompute"),
  )
  handles = [engine.submit(prompt, Sampling(max_new_tokens=new)) for prompt, new in work]
  running = []
  while engine.step():
    if engine.num_waiting:
      running.append(engine.num_running)
  assert all(handle.done for handle in handles)
  full = running[len(running) // 4 :]  # the first prompts fill the pool
  return {"most at once": engine.counts.peak_running, "mean at once": float(np.mean(full))}


def requests_at_once(count: int) -> tuple[list[dict], dict]:
  rng, longest, pool = np.random.default_rng(1), 1024, 16384
  drawn = np.maximum(1, lengths.azure(None)[:count] * 6 // SCALE)
  work = []
  for prompt, output in drawn.tolist():
    prompt = min(prompt, longest - 2)
    work.append((rng.integers(1, 60, prompt).tolist(), max(2, min(output, longest - prompt))))
  budget = pool * D * 2 * 2  # of a bfloat16 cache of `pool` tokens
  found = {name: at_once(dtype, work, 128, budget, longest) for name, dtype in FORMATS.items()}
  rows = [{"what": "engine", "pages": name} | each for name, each in found.items()]
  names = {"requests_at_once": "most at once", "running": "mean at once"}
  return rows, {
    f"{key}_{name}": found[name][column] / found["bf16"][column]
    for key, column in names.items()
    for name in EIGHT
  }


# Time


def filled(dtype: str, context: int, num_layers: int = 1):
  """A cache of rows of `context` random tokens, on pages in turn."""
  config = paged_jax.CacheConfig(
    num_layers, H, D, page_size=T, num_pages=ROWS * context // T, num_rows=ROWS,
    max_length=context, dtype=dtype,
  ).stored_for("cpu")  # fmt: skip
  cache = paged_jax.jitted.init(config)
  cache, info = paged_jax.jitted.extend(cache, jnp.full(ROWS, context, jnp.int32))
  assert info.ok.all()
  return cache


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="count")
def put(cache, k, v, rows, positions, *, count: int = 1):
  """Writes the same keys and values in `count` layers."""
  plan = paged_jax.plan(cache, rows, positions)
  return jax.lax.fori_loop(
    0, count, lambda layer, cache: paged_jax.write(cache, layer, k, v, plan), cache
  )


def in_pairs(name: str, runs: dict[str, Callable], rounds: int, **more):
  """Rows and ratios of the median of pairs."""
  for run in runs.values():
    measure.seconds(run)
  times = np.array([[measure.seconds(run) for run in runs.values()] for _ in range(rounds)])
  ratios = dict(zip(runs, np.median(times / times[:, :1], axis=0).tolist()))
  medians = dict(zip(runs, np.median(times, axis=0).tolist()))
  rows = [
    {"what": name, "pages": each, **more, "ms": 1e3 * medians[each], "over bf16": ratios[each]}
    for each in runs
  ]
  return rows, ratios


def decode(rounds: int, contexts=(512, 2048, 8192)) -> tuple[list[dict], dict]:
  rows, summary = [], {}
  rng = np.random.default_rng(0)
  attend = jax.jit(paged_jax.attend, static_argnums=1)
  for context in contexts:
    row = jnp.arange(ROWS, dtype=jnp.int32)
    q = jnp.asarray(rng.standard_normal((ROWS, Q, D)), jnp.bfloat16)
    runs = {}
    for name, dtype in FORMATS.items():
      cache = filled(dtype, context)
      for at in range(0, context, 64):
        k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((2, ROWS * 64, H, D)))
        positions = jnp.tile(at + jnp.arange(64, dtype=jnp.int32), ROWS)
        cache = put(cache, k, v, jnp.repeat(row, 64), positions)
      plan = paged_jax.jitted.plan(cache, row, jnp.full(ROWS, context - 1, jnp.int32))
      runs[name] = functools.partial(attend, cache, 0, q, plan)
    more, ratios = in_pairs("decode", runs, rounds, tokens=context)
    rows += more
    suffix = {2048: "", 8192: "_8k"}.get(context, f"_{context}")
    summary |= {f"decode_{name}_vs_bf16_cpu{suffix}": ratios[name] for name in EIGHT}
  return rows, summary


class Writes:
  """Writes the same tokens in all layers, again and again."""

  def __init__(self, dtype: str, num_rows: int, size: int, layers: int = 32):
    rng = np.random.default_rng(0)
    self.cache, self.layers = filled(dtype, max(size, T), layers), layers
    rows = jnp.repeat(jnp.arange(num_rows, dtype=jnp.int32), size)
    positions = jnp.tile(jnp.arange(size, dtype=jnp.int32), num_rows)
    kv = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((2, num_rows * size, H, D)))
    self.batch = (*kv, rows, positions)

  def __call__(self):
    self.cache = put(self.cache, *self.batch, count=self.layers)
    return self.cache.pages.kv


def write(rounds: int) -> tuple[list[dict], dict]:
  rows, summary = [], {}
  for suffix, what, num_rows, size in (("", "decode", ROWS, 1), ("_prompt", "prompt", 1, 512)):
    runs = {name: Writes(dtype, num_rows, size) for name, dtype in FORMATS.items()}
    more, ratios = in_pairs(f"write, {what}", runs, rounds, tokens=num_rows * size)
    rows += more
    summary |= {f"write_{name}_vs_bf16_cpu{suffix}": ratios[name] for name in EIGHT}
  return rows, summary
