"""What the real TPU compiler makes of the kernels for 8-bit pages, beside those for 16 bits.

Llama-3-8B's heads and queries in bfloat16, pages of 128 tokens, a pool of 4 GiB. Bundles as in
`kernels_tpu_aot.py`: of the decode of 2,048 tokens of a row, of the write of 32 rows that decode and
of 2,048 tokens of a prompt, those of scales included. `int8_vs_memory_v6e` is the time of the
decode's bundles over the time of the row's bytes, scales included: below 1 it waits for memory.
`int8_decode_vs_bf16_v6e` compares the larger of both times with that of bfloat16.
`temp_share_of_pool` is the most temporary memory over the bytes of the pool, and `aliased` the least
share of the pool that stays in place, of any program: write and attention, with 8, 2 and 1 KV heads
on a core; `extend`, which copies and clears pages; a swap out and in.

Needs the libtpu wheel; `--generations` names the TPUs to compile for.
"""

import dataclasses

import tpu_compiler  # first: it sets the compiler's environment

import jax  # isort: skip
import kernels_tpu_aot as kernels
import measure

import paged_jax
from paged_jax.attention import tpu

NAMES = {"bfloat16": "bf16", "int8": "int8", "float8_e4m3fn": "e4m3"}
LLAMA = kernels.MODELS[0]
HEADS = (8, 2, 1)  # KV heads of Llama-3-8B on one core, on 4 and on 8


def moves(mesh, config):
  """`extend`, and a swap, compiled; few layers and short rows, since an image is temporary memory."""
  config = dataclasses.replace(
    config, num_layers=4, max_length=512, num_pages=config.num_pages * config.num_layers // 4
  )
  cache = tpu_compiler.shapes(mesh, jax.eval_shape(lambda: paged_jax.init(config)))
  row, counts = kernels.integers(mesh), kernels.integers(mesh, config.num_rows)

  def swap(cache, row):
    cache, image, _ = paged_jax.swap_out(cache, row)
    cache, _ = paged_jax.swap_in(cache, row, image)
    return cache

  yield tpu_compiler.Compiled(mesh, paged_jax.extend, cache, counts, donate=(0,))
  yield tpu_compiler.Compiled(mesh, swap, cache, row, donate=(0,))


def compile_all(tpu_name: str, dtype: str):
  """A row of the table for each number of KV heads; the first has the costs of prompts and moves."""
  mesh = tpu_compiler.cores(tpu_name)
  for h in HEADS if dtype != "bfloat16" else HEADS[:1]:
    model = kernels.Model(LLAMA.name, LLAMA.num_heads * h // HEADS[0], h, LLAMA.head_dim)
    config = kernels.cache_config(model, 128, dtype=dtype)
    made = [kernels.layer_step(model, mesh, 32)(config)]
    row = {
      "tpu": tpu_name, "dtype": NAMES[dtype], "KV heads": h,
      "token_bytes": config.page_bytes // (config.num_layers * config.page_size),
      "bundles_2048": made[0].bundles("paged_attention", kernels.CONTEXT // tpu.CHUNK_TOKENS),
      "write_decode_32": kernels.write_bundles(made[0], config, 32, 1),
    }  # fmt: skip
    if h == HEADS[0]:
      made.append(kernels.layer_step(model, mesh, 2048, attends=False)(config))
      row["write_prefill_2048"] = kernels.write_bundles(made[-1], config, 2048, 64)
      made += moves(mesh, config)
    pool_bytes = config.page_bytes * config.num_pages
    yield row | {
      "temp_share": max(x.temp_bytes for x in made) / pool_bytes,
      "aliased": min(x.alias_bytes for x in made) / pool_bytes,
      "compile_s": sum(x.seconds for x in made),
    }


def summary(rows: list[dict]) -> dict[str, float]:
  found = {
    "temp_share_of_pool": max(row["temp_share"] for row in rows),
    "aliased": min(row["aliased"] for row in rows),
  }
  whole = {(row["tpu"], row["dtype"]): row for row in rows if row["KV heads"] == HEADS[0]}
  for (tpu_name, dtype), row in whole.items():
    base = whole[tpu_name, "bf16"]
    found[f"{dtype}_bundles_2048_{tpu_name}_p128"] = row["bundles_2048"]
    if row is not base:
      for what in ("write_decode_32", "write_prefill_2048"):
        found[f"{dtype}_{what}_vs_bf16_{tpu_name}"] = row[what] / base[what]
    if tpu_name == "v6e":
      ours, theirs = (
        kernels.Work(x["bundles_2048"], kernels.CONTEXT * x["token_bytes"]) for x in (row, base)
      )
      memory = kernels.Work(0, ours.num_bytes)
      found[f"{dtype}_vs_memory_v6e"] = ours._replace(num_bytes=0).seconds / memory.seconds
      found[f"{dtype}_decode_vs_bf16_v6e"] = ours.seconds / theirs.seconds
  return found


def main():
  args = measure.arguments(
    __doc__.splitlines()[0], generations=(str, "v5e,v6e,tpu7x", "TPUs to compile for")
  )
  tpu_compiler.keep_bundles()
  generations = args.generations.split(",")
  rows = [row for name in generations for dtype in NAMES for row in compile_all(name, dtype)]
  measure.report(rows, summary(rows), as_json=args.json)


if __name__ == "__main__":
  main()
