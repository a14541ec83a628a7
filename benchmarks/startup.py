"""How long until the first token, and how long do our programs compile?

`cold_s`, `warm_s`: from `paged-jax generate`, a process of its own, to the first token of the embedded
model: with an empty cache of compiled programs, and with what the first run left there.
`extend_compile_s`: to trace and compile `extend` for that model and 32 rows. `engine_compile_s`:
`Engine.warm_up` for that model, nothing compiled before. Medians of seconds; `..._cpu_s` are those
of all cores, which other processes on the machine hardly change (of a command, to its end).

`attend_prefill_compile_s`, `attend_decode_compile_s`: processor seconds to trace and compile `attend`
for one layer of an unrolled model, the slope between 2 and 8 layers. Prefill is 512 tokens of up to 4
rows, decode one token of each of 16 rows, both with the heads of Llama-3-8B.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import jax.numpy as jnp

import paged_jax
from paged_jax import models
from paged_jax.engine import Engine, EngineConfig

Q, H, D, T = 32, 8, 128, 16
FEW, MANY = 2, 8  # layers
STEPS = {"prefill": (512, 4), "decode": (16, 16)}  # tokens, rows
COMMAND = [sys.executable, "-m", "paged_jax", "generate", "To be", "--max-new-tokens", "8"]


def first_token(programs: str) -> float:
  """Seconds from the command to its first output; compiled programs are kept in `programs`."""
  env = {name: value for name, value in os.environ.items() if "CACHE" not in name}
  env["XDG_CACHE_HOME"] = programs
  streams = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  begin = time.perf_counter()
  with subprocess.Popen(COMMAND, env=env, **streams) as process:
    assert process.stdout.read(1), "no token came"
    took = time.perf_counter() - begin
    process.communicate()
  return took


def both(name: str, run: Callable[[], float]) -> dict[str, float]:
  """The seconds that `run` returns, and those of all cores meanwhile, its own children's included."""
  begin = sum(os.times()[:4])
  return {f"{name}_s": run(), f"{name}_cpu_s": sum(os.times()[:4]) - begin}


def starts() -> dict[str, float]:
  with tempfile.TemporaryDirectory() as programs:
    run = functools.partial(first_token, programs)
    return both("cold", run) | both("warm", run)


def compile_extend(config: paged_jax.CacheConfig) -> float:
  cache = jax.eval_shape(lambda: paged_jax.init(config))
  counts = jax.ShapeDtypeStruct((config.num_rows,), jnp.int32)
  jax.clear_caches()
  return measure.seconds(lambda: jax.jit(paged_jax.extend).lower(cache, counts).compile())


def compile_engine(model: models.Decoder, config: paged_jax.CacheConfig) -> float:
  engine = Engine(model, EngineConfig(config))
  jax.clear_caches()
  return measure.seconds(engine.warm_up)


def attend_seconds(num_layers: int, num_tokens: int, num_rows: int, dtype: str) -> dict[str, float]:
  """Processor seconds of tracing and of compiling a program of `num_layers` calls of `attend`."""
  config = paged_jax.CacheConfig(
    num_layers=num_layers, num_kv_heads=H, head_dim=D, page_size=T, num_pages=1024,
    num_rows=num_rows, max_length=4096, dtype=dtype,
  ).stored_for("cpu")  # fmt: skip

  def step(cache, q, rows, positions):
    plan = paged_jax.plan(cache, rows, positions)
    for layer in range(num_layers):
      q = paged_jax.attend(cache, layer, q, plan)
    return q

  jax.clear_caches()
  cache = jax.eval_shape(lambda: paged_jax.init(config))
  q = jax.ShapeDtypeStruct((num_tokens, Q, D), dtype)
  ids = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
  begin = time.process_time()
  lowered = jax.jit(step).lower(cache, q, ids, ids)
  middle = time.process_time()
  lowered.compile()
  return {"trace": middle - begin, "compile": time.process_time() - middle}


def attend_per_layer(num_tokens: int, num_rows: int, dtype: str, rounds: int) -> dict[str, float]:
  """Processor seconds that one layer more costs: medians of `trace` and `compile`."""
  slopes = {"trace": [], "compile": []}
  for _ in range(rounds):
    few, many = (attend_seconds(n, num_tokens, num_rows, dtype) for n in (FEW, MANY))
    for name, each in slopes.items():
      each.append((many[name] - few[name]) / (MANY - FEW))
  return {name: statistics.median(each) for name, each in slopes.items()}


def attend_compile(rounds: int) -> tuple[list[dict], dict[str, float]]:
  """The table, and the seconds per unrolled layer of prefill and of decode, the worse dtype of each."""
  rows = [
    {"step": name, "dtype": dtype, **attend_per_layer(*sizes, dtype, rounds)}
    for name, sizes in STEPS.items()
    for dtype in ("float32", "bfloat16")
  ]
  return rows, {
    f"attend_{name}_compile_s": max(x["trace"] + x["compile"] for x in rows if x["step"] == name)
    for name in STEPS
  }


def main():
  args = measure.arguments(__doc__.splitlines()[0])
  jax.config.update("jax_enable_compilation_cache", False)  # of this process
  model = models.load(models.embedded())
  config = models.cache_config(
    model.config, num_pages=512, num_rows=32, dtype=model.embed_tokens.weight.dtype
  )
  rows = [
    starts()
    | both("extend_compile", lambda: compile_extend(config))
    | both("engine_compile", lambda: compile_engine(model, config))
    for _ in range(max(1, args.rounds // 5))
  ]
  summary = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
  layers, attend = attend_compile(min(3, args.rounds))
  measure.report(rows + layers, summary | attend, as_json=args.json)


if __name__ == "__main__":
  main()
