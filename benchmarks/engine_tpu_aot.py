"""What the real TPU compiler makes of the engine's whole device program, without a TPU.

The program is `paged_jax.engine.program.run`, jitted as the engine does it (cache, rows and past
donated), for a Llama-3.2 of bfloat16 weights, 32 rows of up to 8,192 tokens and pages of 64, on one
core. Four variants: decode of 8 steps; 512 prompt tokens beside one step; 8 steps with the drafts
of `PromptLookup(4)`; 8 steps of beam search, 4 beams wide. Only the attention backend is named here:
the engine would choose it by the platform, which is not there.

Each variant is compiled with a pool of 2 GiB and one of 4 GiB. `temp_MB` is the temporary memory of
the smaller: activations and logits (32 rows x 128,256 tokens of float32 are 16 MB) and whatever else
XLA wants. `growth` is what the larger pool adds to it over what it adds to the pool: 1 where the
pool is copied once. `copied_leaves` are arrays of the cache whose next value is not in the memory of
a donated one. `collectives` is how many there are.

Then one decode step of a Llama-3-8B is weighed for v6e: 64 and 256 rows with 2,048 tokens each, one
row in 64 begins a page. `step_ms` is the compiler's own estimate (see `cycles.py`) for XLA's
operations, and for our kernels the longer of their instruction bundles and of the bytes they move.
`step_vs_bandwidth` is this over the time that the memory takes to read the weights (all of them, also
the embedding, of which a step reads a row per token) and the keys and values once. It ranks programs
and says what is lost; it is not a measurement. `sampled_vs_greedy`: the same program where rows draw
with temperature, top-k and top-p, over one where none does; `nucleus_vs_greedy` without top-k. All
three are of the first step, with 64 rows; `..._most` is the worst of all steps. (Where more tokens are
equally likely at the limit than are kept, one more search is made.)

Needs the libtpu wheel; `--generations` names the TPUs to compile for, `--variants` the variants,
`--steps` the models and rows of the steps.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import statistics
from typing import Any

import tpu_compiler  # first: it sets the compiler's environment

import jax  # isort: skip
import cycles
import jax.numpy as jnp
import kernels_tpu_aot
import measure

import paged_jax
from paged_jax import groups
from paged_jax.attention import tpu
from paged_jax.engine import PromptLookup, sampling
from paged_jax.engine.device import draws, program, records
from paged_jax.models import decoder as decoder_lib

NUM_ROWS = 32
MAX_LENGTH = 8192
POOLS = (2**31, 2**32)
_ROPE = paged_jax.models.Rope(scaling="llama3", base=500_000.0, factor=32.0, high_freq_factor=4.0)
MODELS = {
  "1B": decoder_lib.DecoderConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
    num_kv_heads=8, head_dim=64, max_length=MAX_LENGTH, windows=(None,) * 16, ropes=(_ROPE,) * 16,
    tied=True,
  ),
  "3B": decoder_lib.DecoderConfig(
    vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24,
    num_kv_heads=8, head_dim=128, max_length=MAX_LENGTH, windows=(None,) * 28, ropes=(_ROPE,) * 28,
    tied=True,
  ),
  "8B": decoder_lib.DecoderConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_length=MAX_LENGTH, windows=(None,) * 32,
    ropes=(paged_jax.models.Rope(base=500_000.0),) * 32,
  ),
}  # fmt: skip
CONTEXT = 2048  # tokens of each row whose step is weighed
DRAWS = {  # functions whose conditionals are taken, and of these the ones left
  "greedy": ((), ()),
  "nucleus": (("draw",), ("_top", "_last_tie")),
  "sampled": (("draw",), ("_last_tie",)),
}
STEP_TPU, STEP_POOL = "v6e", 2**33  # 8 GiB fit beside the weights


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a call of the program is asked for."""

  num_steps: int = 8
  num_prompt_tokens: int | None = None
  drafter: PromptLookup | None = None
  num_beams: int = 1


VARIANTS = {
  "decode": Variant(),
  "prompts": Variant(num_steps=1, num_prompt_tokens=512),
  "drafts": Variant(drafter=PromptLookup(4)),
  "beams": Variant(num_beams=4),
}


def call(config: decoder_lib.DecoderConfig, cache: Any, variant: Variant, backend: str):
  """The program, and the shapes that the engine would call it with; the first is of the cache, or of
  a tuple of them."""
  caches = groups.each(cache)
  s, vocab, full = caches[0].num_rows, config.vocab_size, variant.num_beams > 1
  weights = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), decoder_lib.abstract(config)
  )

  def state():
    row = jnp.zeros(s, jnp.int32)
    rows = records.Rows(
      tokens=row,
      remaining=row,
      stop_tokens=jnp.zeros((s, 2 * sampling.MAX_STOP_TOKENS), jnp.int32),
      groups=row,
      scores=jnp.zeros(s, jnp.float32),
      draws=jax.tree.map(jnp.asarray, draws.draws({}, s, vocab)),
    )
    longest = caches[0].pages_per_row * caches[0].page_size + 1 if variant.drafter else 0
    past = records.Past(
      seen=jnp.zeros((s, vocab if full else 0), bool),
      texts=jnp.zeros((s, longest), jnp.int32),
      logits=jnp.zeros((s, vocab), jnp.float32),
    )
    prompts = None
    if variant.num_prompt_tokens is not None:
      token = jnp.zeros(variant.num_prompt_tokens, jnp.int32)
      prompts = records.Prompts(token, token, token, jnp.zeros(s, bool), row)
    edits = records.Edits(changed=jnp.zeros(s, bool), rows=rows)
    adjustments = jax.tree.map(jnp.asarray, draws.adjustments({}, s, vocab)) if full else None
    return rows, past, edits, prompts, adjustments

  args = jax.eval_shape(lambda: paged_jax.init(cache)), weights
  run = functools.partial(
    program.run, num_steps=variant.num_steps, drafter=variant.drafter, num_beams=variant.num_beams,
    implementation=groups.like(cache, [backend] * len(caches)),
  )  # fmt: skip
  return run, (*args, *jax.eval_shape(state))


def pages(config: decoder_lib.DecoderConfig, pool_bytes: int, num_rows: int = NUM_ROWS):
  """A cache for the model in `pool_bytes`."""
  cache = paged_jax.CacheConfig(
    num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
    page_size=64, num_rows=num_rows, max_length=MAX_LENGTH,
  ).stored_for("tpu")  # fmt: skip
  return dataclasses.replace(cache, num_pages=pool_bytes // cache.page_bytes)


def kernel_cycles(config: decoder_lib.DecoderConfig, num_rows: int) -> dict[str, float]:
  """Cycles of one call of each kernel for a token of each row, the mean of all layers, in a process of
  its own.

  To write down the bundles of a whole program would take minutes.
  """
  tpu_compiler.keep_bundles()
  model = kernels_tpu_aot.Model("", config.num_heads, config.num_kv_heads, config.head_dim)
  mesh, cache = tpu_compiler.cores(STEP_TPU), pages(config, STEP_POOL, num_rows)
  compiled = kernels_tpu_aot.layer_step(model, mesh, num_rows)(cache)
  token = cache.page_bytes / cache.page_size / config.num_layers
  blocks = []  # of a row, in each layer
  for window in config.windows:
    seen = CONTEXT if window is None else min(CONTEXT, window)
    bundles = compiled.bundles("paged_attention", -(-seen // tpu.CHUNK_TOKENS))
    blocks.append(max(bundles, seen * token / cycles.BYTES_PER_CYCLE[STEP_TPU]))
  return {
    "paged_attention": num_rows * statistics.mean(blocks),
    "paged_write": kernels_tpu_aot.write_bundles(compiled, cache, num_rows, 1),
  }


def step_rows(name: str, rows: str) -> list[dict]:
  """What a step of the model takes, in the order of `DRAWS`."""
  config, num_rows = MODELS[name], int(rows)
  cache = pages(config, STEP_POOL, num_rows)
  run, operands = call(config, cache, Variant(), "tpu")
  mesh = tpu_compiler.cores(STEP_TPU)
  spawned = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as process:
    kernels = process.submit(kernel_cycles, config, num_rows)
    made = tpu_compiler.Compiled(mesh, run, *tpu_compiler.shapes(mesh, operands), donate=(0, 2, 3))
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands[1]))
  read = weights + num_rows * CONTEXT * cache.page_bytes / cache.page_size
  turns = {"renew.<locals>.clear": num_rows / cache.page_size, "renew.<locals>.copy": 0}
  found = []
  for variant, (taken, left) in DRAWS.items():
    step = cycles.estimate(
      made.text, STEP_TPU, kernels.result(), turns=turns, taken=taken, left=left
    )
    found.append({
      "tpu": STEP_TPU,
      "model": name,
      "variant": f"{variant}, {num_rows} rows",
      "temp_MB": made.temp_bytes / 2**20,
      "compile_s": made.seconds,
      "step_ms": 1e3 * step.total / cycles.CLOCK[STEP_TPU],
      "step_vs_bandwidth": step.total * cycles.BYTES_PER_CYCLE[STEP_TPU] / read,
      "unestimated": step.unestimated,
    })  # fmt: skip
  return found


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    generations=(str, "v5e,v6e", "TPUs to compile for"),
    variants=(str, ",".join(VARIANTS), "variants to compile"),
    model=(str, "3B", "the model of the variants: " + ", ".join(MODELS)),
    steps=(str, "8B:64,8B:256", "model:rows of the steps to weigh; the summary has the first"),
  )
  config, rows = MODELS[args.model], []

  def compiled(mesh, variant, pool_bytes):
    run, operands = call(config, pages(config, pool_bytes), variant, "tpu")
    return tpu_compiler.Compiled(mesh, run, *tpu_compiler.shapes(mesh, operands), donate=(0, 2, 3))

  cache = jax.eval_shape(lambda: paged_jax.init(pages(config, POOLS[0])))
  outputs = set(range(len(jax.tree.leaves(cache))))  # the cache is the first that comes back
  for generation in args.generations.split(","):
    mesh = tpu_compiler.cores(generation)
    for name in args.variants.split(","):
      small, large = (compiled(mesh, VARIANTS[name], pool) for pool in POOLS)
      rows.append({
        "tpu": generation,
        "model": args.model,
        "variant": name,
        "temp_MB": small.temp_bytes / 2**20,
        "growth": (large.temp_bytes - small.temp_bytes) / (POOLS[1] - POOLS[0]),
        "copied_leaves": max(len(outputs - made.aliased_outputs) for made in (small, large)),
        "collectives": sum(sum(made.collectives.values()) for made in (small, large)),
        "compile_s": (small.seconds + large.seconds) / 2,
      })  # fmt: skip
  summary = {name: max(row[name] for row in rows) for name in ("growth", "copied_leaves")}
  summary["collectives"] = sum(row["collectives"] for row in rows)
  steps = [step_rows(*each.split(":")) for each in args.steps.split(",")]
  for step in steps:
    rows += step
  summary["compile_s"] = max(row["compile_s"] for row in rows)
  summary["step_vs_bandwidth"] = steps[0][0]["step_vs_bandwidth"]
  for nth, name in enumerate(DRAWS):
    if nth:
      ratios = [step[nth]["step_ms"] / step[0]["step_ms"] for step in steps]
      summary[f"{name}_vs_greedy"] = ratios[0]
      summary[f"{name}_vs_greedy_most"] = max(ratios)
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
