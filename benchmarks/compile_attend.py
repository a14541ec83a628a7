"""How long does `attend` take to compile on CPU, for each layer of an unrolled model?

A program of `attend` calls, one per layer, each on the result of the one before, is traced and
compiled with 2 and with 8 layers; the slope is what a layer costs. Prefill is 512 tokens of up to 4
rows, decode one token of each of 16 rows, both with the heads of Llama-3-8B. Seconds are processor
time of the whole process, so other programs on the machine hardly count; the persistent cache is off.
"""

import statistics
import time

import measure  # isort: skip  # sets XLA_FLAGS, so it comes before jax
import jax
import jax.numpy as jnp

import paged_jax

Q, H, D, T = 32, 8, 128, 16
FEW, MANY = 2, 8  # layers
STEPS = {"prefill": (512, 4), "decode": (16, 16)}  # tokens, rows


def compile_seconds(
  num_layers: int, num_tokens: int, num_rows: int, dtype: str
) -> dict[str, float]:
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


def per_layer(num_tokens: int, num_rows: int, dtype: str, rounds: int) -> dict[str, float]:
  """Processor seconds that one layer more costs: medians of `trace` and `compile`."""
  jax.config.update("jax_enable_compilation_cache", False)
  slopes = {"trace": [], "compile": []}
  for _ in range(rounds):
    few, many = (compile_seconds(n, num_tokens, num_rows, dtype) for n in (FEW, MANY))
    for name, each in slopes.items():
      each.append((many[name] - few[name]) / (MANY - FEW))
  return {name: statistics.median(each) for name, each in slopes.items()}


def measured(rounds: int) -> tuple[list[dict], dict[str, float]]:
  """The table, and the seconds per unrolled layer of prefill and of decode, the worse dtype of each."""
  rows = [
    {"step": name, "dtype": dtype, **per_layer(*sizes, dtype, rounds)}
    for name, sizes in STEPS.items()
    for dtype in ("float32", "bfloat16")
  ]
  return rows, {
    f"attend_{name}_s_per_layer": max(
      row["trace"] + row["compile"] for row in rows if row["step"] == name
    )
    for name in STEPS
  }


def main():
  args = measure.arguments(__doc__.splitlines()[0])
  measure.report(*measured(min(3, args.rounds)), as_json=args.json)


if __name__ == "__main__":
  main()
