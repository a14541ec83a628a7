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

Needs the libtpu wheel; `--generations` names the TPUs to compile for, `--variants` the variants.
"""

import dataclasses
import functools

import tpu_compiler  # first: it sets the compiler's environment

import jax  # isort: skip
import jax.numpy as jnp
import measure

import paged_jax
from paged_jax.engine import PromptLookup, sampling
from paged_jax.engine.device import draws, program, records
from paged_jax.models import decoder as decoder_lib

NUM_ROWS = 32
MAX_LENGTH = 8192
POOLS = (2**31, 2**32)
_ROPE = decoder_lib.Rope(scaling="llama3", base=500_000.0, factor=32.0, high_freq_factor=4.0)
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
}  # fmt: skip


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder with its attention backend named."""

  decoder: decoder_lib.Decoder
  implementation: str = dataclasses.field(metadata={"static": True})

  def __call__(self, tokens, cache, plan):
    return self.decoder(
      tokens, cache, dataclasses.replace(plan, implementation=self.implementation)
    )

  def logits(self, hidden):
    return self.decoder.logits(hidden)


def call(
  config: decoder_lib.DecoderConfig, cache: paged_jax.CacheConfig, variant: Variant, backend: str
):
  """The program, and the shapes that the engine would call it with; `cache` is the first of them."""
  s, vocab = cache.num_rows, config.vocab_size
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
    longest = cache.pages_per_row * cache.page_size + 1 if variant.drafter else 0
    past = records.Past(
      seen=jnp.zeros((s, vocab), bool),
      texts=jnp.zeros((s, longest), jnp.int32),
      logits=jnp.zeros((s, vocab), jnp.float32),
    )
    prompts = None
    if variant.num_prompt_tokens is not None:
      token = jnp.zeros(variant.num_prompt_tokens, jnp.int32)
      prompts = records.Prompts(token, token, token, jnp.zeros(s, bool), row)
    edits = records.Edits(changed=jnp.zeros(s, bool), rows=rows)
    return rows, past, edits, prompts

  args = jax.eval_shape(lambda: paged_jax.init(cache)), Model(weights, backend)
  run = functools.partial(
    program.run, num_steps=variant.num_steps, drafter=variant.drafter, num_beams=variant.num_beams
  )
  return run, (*args, *jax.eval_shape(state))


def pages(config: decoder_lib.DecoderConfig, pool_bytes: int, page_size: int = 64):
  """A cache for the model in `pool_bytes`."""
  cache = paged_jax.CacheConfig(
    num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
    page_size=page_size, num_rows=NUM_ROWS, max_length=MAX_LENGTH,
  )  # fmt: skip
  return dataclasses.replace(cache, num_pages=pool_bytes // cache.page_bytes)


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    generations=(str, "v5e,v6e", "TPUs to compile for"),
    variants=(str, ",".join(VARIANTS), "variants to compile"),
    model=(str, "3B", "1B or 3B"),
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
  summary = {
    name: max(row[name] for row in rows) for name in ("growth", "copied_leaves", "compile_s")
  }
  summary["collectives"] = sum(row["collectives"] for row in rows)
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
