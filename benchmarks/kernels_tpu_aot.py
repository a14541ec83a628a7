"""What the real TPU compiler makes of our TPU kernels, and of jax's own, without a TPU.

Static VLIW bundles are issue cycles if nothing waits: good for ranking, not for seconds.
`bundles_vs_jax_rpa` is ours over jax's `ragged_paged_attention`, for the decode of 2,048 tokens of
a row with the heads of Llama-3-8B on v6e in bfloat16 (the worse of pages of 64 and 128; jax's with
the best of some block sizes). `bundles_2048_v6e_bf16_p16` and `_p64` are ours; the best published
kernel, RPA v3, needs 5,424 and 4,016. `temp_share_of_pool` is the most temporary memory of any
decode program for v5e and v6e over the bytes of its page array. (A prefill's depends on its tokens,
not on the pool; for 7x the compiler lays the weights of the whole step out anew.) `collectives` is
how many there are in attention and write, KV heads split over four cores too.

Needs the libtpu wheel; `--generations` names the TPUs to compile for.
"""

import dataclasses

import tpu_compiler  # first: it sets the compiler's environment

import jax  # isort: skip
import jax.numpy as jnp
import measure
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import PartitionSpec as P

import paged_jax
from paged_jax.attention import tpu
from paged_jax.models import decoder as decoder_lib

CONTEXT = 2048
BLOCKS = ((512, 4), (512, 8), (1024, 4))  # tokens and queries of jax's; others are worse


@dataclasses.dataclass(frozen=True)
class Model:
  """What attention sees of a model."""

  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int
  options: tuple[tuple[str, float], ...] = ()


MODELS = (
  Model("Llama-3-8B", 32, 8, 128),
  Model("Qwen3-32B", 64, 8, 128),
  Model("Gemma-2-9B", 16, 8, 256, (("softcap", 50.0), ("window", 4096))),
)


def cache_config(model: Model, page_size: int, num_rows: int = 32, max_length: int = 8192):
  """32 layers in a pool of 4 GiB."""
  config = paged_jax.CacheConfig(
    num_layers=32, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, page_size=page_size,
    num_rows=num_rows, max_length=max_length,
  )  # fmt: skip
  return dataclasses.replace(config, num_pages=2**32 // config.page_bytes)


def integers(mesh, *shape):
  return tpu_compiler.shapes(mesh, jax.ShapeDtypeStruct(shape, jnp.int32))


def layer_step(model: Model, mesh, num_tokens: int):
  """Write and attention of one layer for `num_tokens` tokens, over the heads of each core."""

  def step(cache, q, k, rows, positions, layer):
    plan = paged_jax.plan(cache, rows, positions, implementation="tpu")
    cache = paged_jax.write(cache, layer, k, k, plan)
    return cache, paged_jax.attend(cache, layer, q, plan, **dict(model.options))

  def compiled(config):
    heads, whole = P(None, "model"), P()
    specs = paged_jax.sharding.specs(config, mesh)
    run = jax.shard_map(
      step, mesh=mesh, in_specs=(specs, heads, heads, whole, whole, whole),
      out_specs=(specs, heads), check_vma=False,
    )  # fmt: skip
    cache = jax.eval_shape(lambda: paged_jax.init(config))
    q, k = (
      jax.ShapeDtypeStruct((num_tokens, h, model.head_dim), config.dtype)
      for h in (model.num_heads, model.num_kv_heads)
    )
    return tpu_compiler.Compiled(
      mesh, run, tpu_compiler.shapes(mesh, cache, specs), *tpu_compiler.shapes(mesh, (q, k), (heads,) * 2),
      integers(mesh, num_tokens), integers(mesh, num_tokens), integers(mesh), donate=(0,),
    )  # fmt: skip

  return compiled


def whole_step(mesh, page_size: int):
  """A decode step of a 3B Llama: allocation, all layers under `scan`, the next tokens."""
  rope = decoder_lib.Rope(scaling="llama3", base=500_000.0, factor=32.0, high_freq_factor=4.0)
  config = decoder_lib.DecoderConfig(
    vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24,
    num_kv_heads=8, head_dim=128, max_length=8192, windows=(None,) * 28, ropes=(rope,) * 28,
    tied=True,
  )  # fmt: skip
  weights = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), decoder_lib.abstract(config)
  )
  pages = paged_jax.CacheConfig(
    num_layers=28, num_kv_heads=8, head_dim=128, page_size=page_size, num_rows=32, max_length=8192
  )
  pages = dataclasses.replace(pages, num_pages=2**32 // pages.page_bytes)

  def step(decoder, cache, tokens):
    cache, info = paged_jax.extend(cache, jnp.ones_like(tokens))
    rows = jnp.where(info.ok, jnp.arange(len(tokens)), len(tokens))
    plan = paged_jax.plan(cache, rows, cache.lengths - 1, implementation="tpu")
    hidden, cache = decoder(tokens, cache, plan)
    return cache, jnp.argmax(decoder.logits(hidden), axis=-1)

  cache = jax.eval_shape(lambda: paged_jax.init(pages))
  args = tpu_compiler.shapes(mesh, weights), tpu_compiler.shapes(mesh, cache), integers(mesh, 32)
  return tpu_compiler.Compiled(mesh, step, *args, donate=(1,)), pages


def rpa(mesh, model: Model, page_size: int) -> int:
  """The bundles of jax's own kernel with its best blocks."""
  bf16 = jnp.bfloat16
  q = jax.ShapeDtypeStruct((32, model.num_heads, model.head_dim), bf16)
  kv = jax.ShapeDtypeStruct((512, page_size, 2 * model.num_kv_heads, model.head_dim), bf16)
  args = *tpu_compiler.shapes(mesh, (q, kv)), integers(mesh, 32)
  args = *args, integers(mesh, 32, 8192 // page_size), integers(mesh, 33), integers(mesh, 1)

  def bundles(tokens, queries):
    def run(*args):
      return ragged_paged_attention(
        *args, num_kv_pages_per_block=tokens // page_size, num_queries_per_block=queries,
        vmem_limit_bytes=tpu.VMEM_BYTES,
      )  # fmt: skip

    compiled = tpu_compiler.Compiled(mesh, run, *args)
    return compiled.bundles("ragged_paged_attention", CONTEXT // tokens)

  return min(bundles(*block) for block in BLOCKS)


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    generations=(str, "v5e,v6e,tpu7x", "TPUs to compile for"),
    models=(int, len(MODELS), "how many models' attention to compile"),
  )
  tpu_compiler.keep_bundles()
  rows, ours = [], {}

  def add(compiled, config, cores, **columns):
    share = compiled.temp_bytes * cores / (config.page_bytes * config.num_pages)
    rows.append(
      columns
      | {
        "page": config.page_size, "cores": cores, "temp_MB": compiled.temp_bytes / 2**20,
        "temp_share": share,
        "aliased": compiled.alias_bytes * cores / (config.page_bytes * config.num_pages),
        "collectives": sum(compiled.collectives.values()), "compile_s": compiled.seconds,
      }
    )  # fmt: skip
    return rows[-1]

  for tpu_name in args.generations.split(","):
    one, four = tpu_compiler.cores(tpu_name), tpu_compiler.cores(tpu_name, 4)
    for model in MODELS[: args.models]:
      for num_tokens, page_size in ((32, 16), (32, 64), (32, 128), (2048, 64)):
        config = cache_config(model, page_size)
        compiled = layer_step(model, one, num_tokens)(config)
        row = add(compiled, config, 1, tpu=tpu_name, what=model.name, tokens=num_tokens)
        if num_tokens == 32:
          chunks = CONTEXT // min(tpu.CHUNK_TOKENS, CONTEXT)
          row["bundles_2048"] = compiled.bundles("paged_attention", chunks)
          ours[tpu_name, model.name, page_size] = row["bundles_2048"]
      config = cache_config(model, 64)
      compiled = layer_step(model, four, 32)(config)
      add(compiled, config, 4, tpu=tpu_name, what=model.name, tokens=32)
    config = cache_config(MODELS[0], 16, num_rows=1024, max_length=8192 * 16)
    compiled = layer_step(MODELS[0], one, 1024)(config)
    add(compiled, config, 1, tpu=tpu_name, what="1,024 rows x 8,192 pages", tokens=1024)
    compiled, config = whole_step(one, 64)
    add(compiled, config, 1, tpu=tpu_name, what="step of a 3B model", tokens=32)

  summary = {
    "temp_share_of_pool": max(
      (row["temp_share"] for row in rows if row["tokens"] == 32 and row["tpu"] != "tpu7x"),
      default=None,
    ),
    "collectives": sum(row["collectives"] for row in rows),
    "compile_s": max(row["compile_s"] for row in rows),
  }
  if "v6e" in args.generations:
    llama, mesh = MODELS[0], tpu_compiler.cores("v6e")
    for page_size in (64, 128):
      rows.append({"tpu": "v6e", "what": "jax's ragged_paged_attention", "page": page_size,
                   "bundles_2048": rpa(mesh, llama, page_size)})  # fmt: skip
    summary |= {
      f"bundles_2048_v6e_bf16_p{size}": ours["v6e", llama.name, size] for size in (16, 64, 128)
    }
    summary["bundles_vs_jax_rpa"] = max(
      ours["v6e", llama.name, row["page"]] / row["bundles_2048"] for row in rows[-2:]
    )
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
