"""What does a cache per group of layers add to a decode step on a TPU, by the compiler's estimate?

A decode step of the engine's program for v6e, of the shape of a Gemma 3 1B: 64 and 256 rows with 2,048
tokens each, pages of 64, one row in 64 begins a page. `decode_step_vs_uniform`: its cycles on a
cache of the four layers that see all tokens and one of the 22 that see 512, over its cycles on one
uniform cache; the worse of the two numbers of rows. XLA's operations are counted as in
`engine_tpu_aot.py`. Our kernels take the same on either side, as they read the same pages. Other
models: `--models`.

`temp_MB` is the program's temporary memory, `copied_leaves` are arrays of the caches whose next
value is not in the memory of a donated one, `loops` are loops over layers.

Needs the libtpu wheel.
"""

import concurrent.futures
import multiprocessing

import tpu_compiler  # first: it sets the compiler's environment

import jax  # isort: skip
import cycles
import engine_tpu_aot
import measure

from paged_jax import groups, models
from paged_jax.models import families

TPU, PAGE, POOL = engine_tpu_aot.STEP_TPU, 64, 2**33
_GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 26, "num_attention_heads": 4,
          "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "hidden_size": 1152,
          "intermediate_size": 6912, "vocab_size": 262_144}  # fmt: skip
MODELS = {
  "gemma3_1b": families.read(_GEMMA),
}


def step(config, num_rows: int, kernels, *, uniform: bool) -> dict:
  """A decode step, greedy."""
  caches = models.cache_config(
    config, memory_bytes=POOL, num_rows=num_rows, page_size=PAGE, max_length=8192, uniform=uniform
  )
  stored = groups.like(caches, [x.stored_for("tpu") for x in groups.each(caches)])
  run, operands = engine_tpu_aot.call(config, stored, engine_tpu_aot.Variant(), "tpu")
  mesh = tpu_compiler.cores(TPU)
  made = tpu_compiler.Compiled(mesh, run, *tpu_compiler.shapes(mesh, operands), donate=(0, 2, 3))
  turns = {"renew.<locals>.clear": num_rows / PAGE, "renew.<locals>.copy": 0}
  found = cycles.estimate(made.text, TPU, kernels, turns=turns)
  outputs = set(range(len(jax.tree.leaves(operands[0]))))  # the caches are the first that come back
  return {
    "what": "uniform" if uniform else "groups",
    "num_rows": num_rows,
    "step_ms": 1e3 * found.total / cycles.CLOCK[TPU],
    "unestimated": found.unestimated,
    "temp_MB": made.temp_bytes / 2**20,
    "copied_leaves": len(outputs - made.aliased_outputs),
    "compile_s": made.seconds,
  }


def main():
  args = measure.arguments(
    __doc__.splitlines()[0], num_rows=(str, "64,256", "rows of the steps to weigh")
  )
  config, rows, ratios = MODELS["gemma3_1b"], [], []
  spawned = multiprocessing.get_context("spawn")
  for num_rows in map(int, args.num_rows.split(",")):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as process:
      kernels = process.submit(engine_tpu_aot.kernel_cycles, config, num_rows).result()
    ours, theirs = (step(config, num_rows, kernels, uniform=each) for each in (False, True))
    rows += [ours, theirs]
    ratios.append(ours["step_ms"] / theirs["step_ms"])
  summary = {
    "decode_step_vs_uniform": max(ratios),
    "copied_leaves": max(row["copied_leaves"] for row in rows),
  }
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
