"""What the real TPU compiler makes of our TPU kernels, and of jax's own, without a TPU.

Static VLIW bundles are issue cycles if nothing waits: good for ranking, not for seconds.
`bundles_vs_jax_rpa` is ours over jax's `ragged_paged_attention`, for the decode of 2,048 tokens of
a row with the heads of Llama-3-8B on v6e in bfloat16 (the worse of pages of 64 and 128; jax's with
the best of some block sizes). `bundles_2048_v6e_bf16_p16` and `_p64` are ours; the best published
kernel, RPA v3, needs 5,424 and 4,016. `write_prefill_2048` is the write of 2,048 tokens of a row
into pages of 64. `temp_share_of_pool` is the most temporary memory of any
decode program for v5e and v6e over the bytes of its page array. (A prefill's depends on its tokens,
not on the pool; for 7x the compiler lays the weights of the whole step out anew.) `collectives` is
how many there are in attention and write, KV heads split over four cores too.

Batches of parts, v6e, pages of 64: S rows that decode at 2,048 tokens, and a piece of 512 tokens of
a prompt that ends at 8,192. The time is the larger of all bundles at 1.755 GHz and all bytes at
1.64 TB/s. `mixed_vs_apart` is the batch over the rows alone and the prompt alone, `mixed_vs_jax_rpa`
over jax's kernel (which has one block size for both; the best one counts), both the worse of S=32
and 256. `mixed_vs_jax_rpa_in_turn` lets nothing of the rows overlap with the prompt: the larger of
bundles and bytes of each, added up. `prefill_64x512` are bundles for 64
queries and 512 keys of all heads. `drafts_vs_plain` is a step of 256 rows with 5 tokens each over
one with one token each. `mla_decode_vs_bandwidth` is the decode of 16 rows of 2,048 tokens of
DeepSeek-V3 (128 query heads over one KV head, values 512 of 576 channels) over the time of its
bytes, 640 channels as they are stored. `plan_ops_in_layer` counts gathers, scatters and cumulative
sums of integers inside a loop over layers that writes and attends.

Needs the libtpu wheel; `--generations` names the TPUs to compile for.
"""

import collections
import dataclasses
import functools

import tpu_compiler  # first: it sets the compiler's environment

import jax  # isort: skip
from typing import NamedTuple

import jax.numpy as jnp
import measure
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import PartitionSpec as P

import paged_jax
from paged_jax.attention import tpu, tpu_write
from paged_jax.engine.device import records
from paged_jax.models import decoder as decoder_lib

CONTEXT = 2048
BLOCKS = ((512, 4), (512, 8), (1024, 4))  # tokens and queries of jax's; others are worse
MIXED_BLOCKS = ((512, 16), (512, 32))  # the best for 256 rows, and for 32
PIECE, PROMPT, BLOCK = 512, 8192, 64  # tokens of a prompt in a step, of all of it, of a block
# parts: rows that decode, rows that verify 4 drafts, a piece of prompts
ROWS, VERIFIED, TOKENS = (32, 32, 1), (160, 32, 5), (PIECE, records.most_prompts(PIECE), PIECE)
CLOCK, BANDWIDTH = 1.755e9, 1.64e12  # of v6e
VMEM_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Model:
  """What attention sees of a model."""

  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int
  options: tuple[tuple[str, float], ...] = ()
  value_dim: int | None = None


MLA = Model("DeepSeek-V3", 128, 1, 576, value_dim=512)
MODELS = (
  Model("Llama-3-8B", 32, 8, 128),
  Model("Qwen3-32B", 64, 8, 128),
  Model("Gemma-2-9B", 16, 8, 256, (("softcap", 50.0), ("window", 4096))),
)


def cache_config(
  model: Model, page_size: int, num_rows: int = 32, max_length: int = 8192, dtype: str = "bfloat16"
):
  """32 layers in a pool of 4 GiB."""
  config = paged_jax.CacheConfig(
    num_layers=32, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, page_size=page_size,
    num_rows=num_rows, max_length=max_length, value_dim=model.value_dim, dtype=dtype,
  ).stored_for("tpu")  # fmt: skip
  return dataclasses.replace(config, num_pages=2**32 // config.page_bytes)


def integers(mesh, *shape):
  return tpu_compiler.shapes(mesh, jax.ShapeDtypeStruct(shape, jnp.int32))


def layer_step(model: Model, mesh, num_tokens: int, *, attends: bool = True):
  """Write, and attention, of one layer for `num_tokens` tokens, over the heads of each core."""

  def step(cache, q, k, rows, positions, layer):
    plan = paged_jax.plan(cache, rows, positions, implementation="tpu")
    cache = paged_jax.write(cache, layer, k, k if model.value_dim is None else None, plan)
    return cache, paged_jax.attend(cache, layer, q, plan, **dict(model.options)) if attends else q

  def compiled(config):
    heads, whole = P(None, "model"), P()
    specs = paged_jax.sharding.specs(config, mesh)
    run = jax.shard_map(
      step, mesh=mesh, in_specs=(specs, heads, heads, whole, whole, whole),
      out_specs=(specs, heads), check_vma=False,
    )  # fmt: skip
    cache = jax.eval_shape(lambda: paged_jax.init(config))
    q, k = (
      jax.ShapeDtypeStruct((num_tokens, h, model.head_dim), jnp.bfloat16)
      for h in (model.num_heads, model.num_kv_heads)
    )
    return tpu_compiler.Compiled(
      mesh, run, tpu_compiler.shapes(mesh, cache, specs), *tpu_compiler.shapes(mesh, (q, k), (heads,) * 2),
      integers(mesh, num_tokens), integers(mesh, num_tokens), integers(mesh), donate=(0,),
    )  # fmt: skip

  return compiled


def whole_step(mesh, page_size: int):
  """A decode step of a 3B Llama: allocation, all layers under `scan`, the next tokens."""
  rope = paged_jax.models.Rope(scaling="llama3", base=500_000.0, factor=32.0, high_freq_factor=4.0)
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
  ).stored_for("tpu")
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


class Work(NamedTuple):
  """What a kernel issues and moves."""

  bundles: float
  num_bytes: float

  def __add__(self, other):
    return Work(self.bundles + other.bundles, self.num_bytes + other.num_bytes)

  @property
  def seconds(self) -> float:
    """On v6e: whatever it waits for longer, its own instructions or memory."""
    return max(self.bundles / CLOCK, self.num_bytes / BANDWIDTH)


def token_bytes(model: Model) -> int:
  """Of one token and layer in bfloat16, as they are stored."""
  config = cache_config(model, 64)
  return config.page_bytes // (config.num_layers * config.page_size)


@functools.cache
def attention(mesh, model: Model, *parts: tuple[int, int, int]):
  """Bundles around a chunk's, and of one chunk, of the kernel of each part."""
  config = cache_config(model, 64)
  num_tokens = sum(part[0] for part in parts)

  def step(cache, q, rows, positions, layer):
    plan = paged_jax.plan(cache, rows, positions, implementation="tpu", parts=parts)
    return paged_jax.attend(cache, layer, q, plan, **dict(model.options))

  cache = jax.eval_shape(lambda: paged_jax.init(config))
  q = jax.ShapeDtypeStruct((num_tokens, model.num_heads, model.head_dim), config.dtype)
  compiled = tpu_compiler.Compiled(
    mesh, step, *tpu_compiler.shapes(mesh, (cache, q)), integers(mesh, num_tokens),
    integers(mesh, num_tokens), integers(mesh),
  )  # fmt: skip
  return compiled.kernels("paged_attention")


def block_rows(mesh, tpu_name: str, model: Model) -> list[dict]:
  """Bundles of blocks of several sizes."""
  found = []
  for size, part in {1: ROWS, 8: VERIFIED, 16: (16, 1, 16), 64: TOKENS}.items():
    ((around, chunk),) = attention(mesh, model, part)
    bundles = around + CONTEXT // tpu.CHUNK_TOKENS * chunk
    found.append({"tpu": tpu_name, "what": "block", "queries": size, "around": around,
                  "chunk": chunk, "bundles_2048": bundles})  # fmt: skip
  return found


def decode(model: Model, kernel, num_rows: int) -> Work:
  """Rows of `CONTEXT` tokens, a block each."""
  around, chunk = kernel
  size = tpu.CHUNK_TOKENS if model.value_dim is None else tpu.SHARED_CHUNK_TOKENS
  bundles = num_rows * (around + CONTEXT // size * chunk)
  return Work(bundles, num_rows * CONTEXT * token_bytes(model))


def prefill(model: Model, kernel) -> Work:
  """The last `PIECE` tokens of a prompt, in blocks of 64."""
  around, chunk = kernel
  ends = range(PROMPT - PIECE + BLOCK, PROMPT + 1, BLOCK)
  bundles = sum(around + -(-end // tpu.CHUNK_TOKENS) * chunk for end in ends)
  return Work(bundles, sum(ends) * token_bytes(model))


def batches(mesh, model: Model) -> dict[str, float]:
  """What parts are worth. How many rows there are changes no kernel, only how often it runs."""
  (alone,), (piece,) = attention(mesh, model, ROWS), attention(mesh, model, TOKENS)
  (drafts,), (first, second) = (
    attention(mesh, model, VERIFIED),
    attention(mesh, model, ROWS, TOKENS),
  )
  theirs = {block: rpa_kernel(mesh, model, 64, 32 + PIECE, 33, *block) for block in MIXED_BLOCKS}
  found = collections.defaultdict(float)
  for num_rows in (32, 256):
    ours = decode(model, first, num_rows), prefill(model, second)
    apart = decode(model, alone, num_rows).seconds + prefill(model, piece).seconds
    jax_s = [rpa_mixed(model, kernel, num_rows, *block) for block, kernel in theirs.items()]
    for name, ratio in {
      "mixed_vs_apart": sum(work.seconds for work in ours) / apart,
      "mixed_vs_jax_rpa": (ours[0] + ours[1]).seconds / min((a + b).seconds for a, b in jax_s),
      "mixed_vs_jax_rpa_in_turn": sum(work.seconds for work in ours)
      / min(a.seconds + b.seconds for a, b in jax_s),
    }.items():
      found[name] = max(found[name], ratio)
  return found | {
    "prefill_64x512": piece[1],
    "drafts_vs_plain": decode(model, drafts, 256).seconds / decode(model, alone, 256).seconds,
    "plan_ops_in_layer": plan_ops_in_layer(model),
  }


def rpa_mixed(model: Model, kernel, num_rows: int, tokens: int, queries: int) -> tuple[Work, Work]:
  """The rows that decode, and the prompt, in jax's own kernel with blocks of that size."""
  around, chunk = kernel
  blocks, size = PIECE // queries, token_bytes(model)
  rows = num_rows // queries * around + num_rows * (CONTEXT // tokens) * chunk
  piece = blocks * (around + -(-PROMPT // tokens) * chunk)
  return Work(rows, num_rows * CONTEXT * size), Work(piece, blocks * PROMPT * size)


def plan_ops_in_layer(model: Model) -> int:
  """Gathers, scatters and cumulative sums of integers in the body of a loop over layers."""
  config = cache_config(model, 64)
  parts = ((32, 32), (PIECE, 8))

  def step(cache, q, k, rows, positions):
    plan = paged_jax.plan(cache, rows, positions, implementation="tpu", parts=parts)

    def layer(cache, index):
      cache = paged_jax.write(cache, index, k, k, plan)
      return cache, paged_jax.attend(cache, index, q, plan, **dict(model.options))

    return jax.lax.scan(layer, cache, jnp.arange(config.num_layers))

  num_tokens = sum(part[0] for part in parts)
  q, k = (
    jax.ShapeDtypeStruct((num_tokens, h, model.head_dim), config.dtype)
    for h in (model.num_heads, model.num_kv_heads)
  )
  ids = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
  cache = jax.eval_shape(lambda: paged_jax.init(config))
  jaxpr = jax.make_jaxpr(step)(cache, q, k, ids, ids)
  (scan,) = (x for x in jaxpr.eqns if x.primitive.name == "scan")
  return sum(
    any(name in x.primitive.name for name in ("gather", "scatter", "cum", "sort"))
    and jnp.issubdtype(x.invars[0].aval.dtype, jnp.integer)
    for x in equations(scan.params["jaxpr"].jaxpr)
  )


def equations(jaxpr):
  """All equations, those of calls inside too, but not those of kernels."""
  for equation in jaxpr.eqns:
    yield equation
    if equation.primitive.name != "pallas_call":
      for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
        yield from equations(inner) if hasattr(inner, "eqns") else ()


def rpa(mesh, model: Model, page_size: int) -> int:
  """Bundles of jax's own kernel for the decode of a row, with its best blocks."""

  def bundles(tokens, queries):
    around, chunk = rpa_kernel(mesh, model, page_size, 32, 32, tokens, queries)
    return around + CONTEXT // tokens * chunk

  return min(bundles(*block) for block in BLOCKS)


def rpa_kernel(mesh, model: Model, page_size, num_tokens, num_rows, tokens, queries):
  """Bundles around a chunk's, and of one chunk, of jax's own kernel."""
  bf16 = jnp.bfloat16
  q = jax.ShapeDtypeStruct((num_tokens, model.num_heads, model.head_dim), bf16)
  kv = jax.ShapeDtypeStruct((512, page_size, 2 * model.num_kv_heads, model.head_dim), bf16)
  args = *tpu_compiler.shapes(mesh, (q, kv)), integers(mesh, num_rows)
  args = *args, integers(mesh, num_rows, 8192 // page_size), integers(mesh, num_rows + 1)
  args = *args, integers(mesh, 1)

  def run(*args):
    return ragged_paged_attention(
      *args, num_kv_pages_per_block=tokens // page_size, num_queries_per_block=queries,
      vmem_limit_bytes=VMEM_BYTES,
    )  # fmt: skip

  (kernel,) = tpu_compiler.Compiled(mesh, run, *args).kernels("ragged_paged_attention")
  return kernel


def write_bundles(compiled, config, num_tokens: int, block_size: int) -> int:
  """Bundles of the write of tokens that come in blocks, as prompts that fill pages or one per row.

  The kernel has a loop over windows, which runs half a ring longer, and a loop that waits for the
  last ring of windows. If the compiler holds the new keys and values in VMEM, the copies of a
  window's tokens are loops within the first, of one turn per register.
  """
  pages = jax.eval_shape(lambda: paged_jax.init(config)).pages

  def bundles(name, array, size, num_windows, registers):
    ring = tpu_write.ring_size(array, size, num_tokens)
    (loops,) = compiled.loops(name)
    before, window, *copies, end = (loop["bundles"] for loop in loops)
    turns = (num_windows + ring // 2) * window + num_windows * registers * sum(copies)
    return before + turns + min(ring, num_windows) * end

  size = tpu_write.window_size(pages, block_size)
  registers = config.num_kv_heads * size * config.head_dim * pages.kv.dtype.itemsize // 4096
  found = bundles("paged_write", pages.kv, size, num_tokens // min(size, block_size), registers)
  if pages.scales is not None:
    size = tpu.LANES
    num_windows = num_tokens if block_size == 1 else num_tokens // size
    registers = -(-config.num_scales // 8) * 2
    found += bundles("paged_scales", pages.scales, size, num_windows, registers)
  return found


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    generations=(str, "v5e,v6e,tpu7x", "TPUs to compile for"),
    models=(int, len(MODELS), "how many models' attention to compile"),
  )
  tpu_compiler.keep_bundles()
  rows, ours, writes, mla = [], {}, {}, {}

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
      sizes = [(32, 16), (32, 64), (32, 128)]
      for num_tokens, page_size in sizes + ([(2048, 64)] if model == MODELS[0] else []):
        config = cache_config(model, page_size)
        compiled = layer_step(model, one, num_tokens)(config)
        row = add(compiled, config, 1, tpu=tpu_name, what=model.name, tokens=num_tokens)
        if num_tokens == 32:
          chunks = CONTEXT // min(tpu.CHUNK_TOKENS, CONTEXT)
          row["bundles_2048"] = compiled.bundles("paged_attention", chunks)
          ours[tpu_name, model.name, page_size] = row["bundles_2048"]
        else:
          row["bundles_write"] = write_bundles(compiled, config, num_tokens, 64)
          writes[tpu_name, model.name] = row["bundles_write"]
      config = cache_config(model, 64)
      compiled = layer_step(model, four, 32)(config)
      add(compiled, config, 4, tpu=tpu_name, what=model.name, tokens=32)
    config = cache_config(MLA, 64, num_rows=16)
    compiled = layer_step(MLA, one, 16)(config)
    row = add(compiled, config, 1, tpu=tpu_name, what=MLA.name, tokens=16)
    (kernel,) = compiled.kernels("paged_attention")
    mla[tpu_name] = decode(MLA, kernel, 16)
    row["bundles_2048"] = mla[tpu_name].bundles / 16
    config = cache_config(MODELS[0], 16, num_rows=1024, max_length=8192 * 16)
    compiled = layer_step(MODELS[0], one, 1024)(config)
    add(compiled, config, 1, tpu=tpu_name, what="1,024 rows x 8,192 pages", tokens=1024)
    rows += block_rows(one, tpu_name, MODELS[0])
    compiled, config = whole_step(one, 64)
    add(compiled, config, 1, tpu=tpu_name, what="step of a 3B model", tokens=32)

  summary = {
    "temp_share_of_pool": max(
      (row["temp_share"] for row in rows if row.get("tokens") == 32 and row["tpu"] != "tpu7x"),
      default=None,
    ),
    "collectives": sum(row.get("collectives", 0) for row in rows),
    "compile_s": max(row.get("compile_s", 0) for row in rows),
  }
  if "v6e" in args.generations:
    llama, mesh = MODELS[0], tpu_compiler.cores("v6e")
    for page_size in (64, 128):
      rows.append({"tpu": "v6e", "what": "jax's ragged_paged_attention", "page": page_size,
                   "bundles_2048": rpa(mesh, llama, page_size)})  # fmt: skip
    summary |= batches(mesh, llama)
    summary |= {
      f"bundles_2048_v6e_bf16_p{size}": ours["v6e", llama.name, size] for size in (16, 64, 128)
    }
    summary["write_prefill_2048"] = writes["v6e", llama.name]
    work = mla["v6e"]
    summary["mla_decode_vs_bandwidth"] = work.seconds / (work.num_bytes / BANDWIDTH)
    summary["bundles_vs_jax_rpa"] = max(
      ours["v6e", llama.name, row["page"]] / row["bundles_2048"] for row in rows[-2:]
    )
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
