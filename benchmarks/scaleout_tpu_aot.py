"""What the real TPU compiler makes of the engine on a mesh, without a TPU.

The program is that of `engine_tpu_aot.py`, with KV heads and weights split over the cores of a mesh as
`Engine(model, config, mesh=mesh)` does it: 8 decode steps, or a step with 512 tokens of prompts, for 64
rows. `unexpected_collectives` is how many there are beyond two all-reduces per layer (one loop has
them all), one of the embedding and one all-gather of the logits.
`temp_MB` is the temporary memory of a core, `temp_share` that over its part of the pool, `copied_GB`
what of the pool is not updated in place.

`pool_bytes_per_chip_vs_ideal` is the part of the pool on a device over what its own heads need, the
worst of 1 to 8 KV heads on 1, 2, 4 and 8 devices, in bfloat16 and int8; it compiles nothing.

Needs the libtpu wheel; `--meshes` names generation:cores:model.
"""

import collections
import dataclasses
import itertools

import tpu_compiler  # first: it sets the compiler's environment

import jax  # isort: skip
import engine_tpu_aot as engine
import measure
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

import paged_jax
from paged_jax import sharding
from paged_jax.models import decoder as decoder_lib
from paged_jax.models import placement

NUM_ROWS, POOL = 64, 2**32
LLAMA_70B = decoder_lib.DecoderConfig(
  vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64,
  num_kv_heads=8, head_dim=128, max_length=engine.MAX_LENGTH, windows=(None,) * 80,
  ropes=(paged_jax.models.Rope(base=500_000.0),) * 80,
)  # fmt: skip
MODELS = engine.MODELS | {"70B": LLAMA_70B}
MESHES = "v5e:4:8B,v5e:8:8B,v6e:8:8B,v6e:8:70B"
STEP = collections.Counter({"all-reduce": 3, "all-gather": 1})  # both programs hold one step


def weights(config, model, mesh):
  """The model's shapes, where `models.load(path, mesh=mesh)` would put them."""
  graph, state = nnx.split(model)
  leaves = dict(nnx.to_flat_state(state))
  for path, leaf in leaves.items():
    x = leaf.get_value()
    where = NamedSharding(mesh, placement.spec(config, path, x.shape, mesh, "model"))
    leaves[path] = leaf.replace(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where))
  return nnx.merge(graph, nnx.from_flat_state(list(leaves.items())))


def compile_one(generation: str, count: int, model_name: str, variant_name: str) -> dict:
  """A row of the table."""
  mesh, config = tpu_compiler.cores(generation, count), MODELS[model_name]
  split = sharding.split(engine.pages(config, POOL, NUM_ROWS), mesh)
  run, (cache, model, *rest) = engine.call(config, split, engine.VARIANTS[variant_name], "tpu")
  where = split.split.spec(2)
  cache = dataclasses.replace(
    cache,
    ledger=tpu_compiler.shapes(mesh, cache.ledger),
    pages=tpu_compiler.shapes(mesh, cache.pages, jax.tree.map(lambda _: where, cache.pages)),
  )
  rest = [None if x is None else tpu_compiler.shapes(mesh, x) for x in rest]
  args = cache, weights(config, model, mesh), *rest
  made = tpu_compiler.Compiled(mesh, run, *args, donate=(0, 2, 3))
  found = collections.Counter(made.collectives)
  part = split.num_pages * split.page_bytes / count
  return {
    "mesh": f"{generation}-{count}", "model": model_name, "program": variant_name,
    "collectives": ", ".join(f"{n} {name}" for name, n in sorted(found.items())),
    "unexpected": sum((found - STEP).values()),
    "temp_MB": made.temp_bytes / 1e6,
    "temp_share": made.temp_bytes / part,
    "copied_GB": max(0.0, part - made.alias_bytes) / 1e9,
    "compile_s": made.seconds,
  }  # fmt: skip


def pool_share() -> float:
  """Bytes of the pool on a device over those that its own heads need, the worst."""
  worst = 0.0
  for heads, count, dtype in itertools.product(range(1, 9), (1, 2, 4, 8), ("bfloat16", "int8")):
    if heads % count and count % heads:
      continue  # neither whole heads per device, nor devices per head
    devices = np.array(jax.devices("cpu")[:1] * count)
    mesh = Mesh(devices, ("model",), axis_types=(AxisType.Auto,))
    whole = paged_jax.CacheConfig(num_kv_heads=heads, dtype=dtype)
    ideal = whole.page_bytes * max(1, heads // count) / heads
    worst = max(worst, sharding.split(whole, mesh).page_bytes / count / ideal)
  return worst


def main():
  args = measure.arguments(
    __doc__.splitlines()[0], meshes=(str, MESHES, "generation:cores:model, with commas")
  )
  rows = []
  for name in args.meshes.split(","):
    generation, count, model = name.split(":")
    rows += [compile_one(generation, int(count), model, x) for x in ("decode", "prompts")]
  summary = {
    "unexpected_collectives": sum(row["unexpected"] for row in rows),
    "copied_GB": max(row["copied_GB"] for row in rows),
    "temp_share": max(row["temp_share"] for row in rows),
    "pool_bytes_per_chip_vs_ideal": pool_share(),
  }
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
