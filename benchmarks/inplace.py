"""Does any verb, or a whole decode step, cost more in a larger pool?

Each runs in two pools 8 times apart, the smaller at least 4 times the last-level cache, in turns.
`temp_growth`: how much the compiled programs' temporary memory grows, in bytes, the worst row.
`time_growth`: time in the large pool over time in the small one, the worst row.
"""

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import jax.numpy as jnp

import paged_jax

ROWS, STEPS, FACTOR = 8, 16, 8
LAYERS, HEADS, DIM, LENGTH = 8, 4, 64, 512


def grow(cache, _):
  cache, info = paged_jax.extend(cache, jnp.ones(ROWS, jnp.int32))
  return cache, info.ok.all()


def write(cache, _):
  plan = paged_jax.plan(cache, jnp.arange(ROWS, dtype=jnp.int32), cache.lengths - 1)
  k = jnp.ones((ROWS, HEADS, DIM)) * plan.positions[:, None, None].astype(jnp.float32)
  for layer in range(LAYERS):
    cache = paged_jax.write(cache, layer, k, -k, plan)
  return cache, plan.ok.all()


def decode(cache, _):
  cache, info = paged_jax.extend(cache, jnp.ones(ROWS, jnp.int32))
  plan = paged_jax.plan(cache, jnp.arange(ROWS, dtype=jnp.int32), cache.lengths - 1)

  def layer(carry, index):
    cache, x = carry
    cache = paged_jax.write(cache, index, x, -x, plan)
    return (cache, x + paged_jax.attend(cache, index, x, plan)), None

  x = jnp.ones((ROWS, HEADS, DIM))
  (cache, _), _ = jax.lax.scan(layer, (cache, x), jnp.arange(LAYERS, dtype=jnp.int32))
  return cache, info.ok.all()


class Loop:
  """A cache that goes through sixteen steps and back, timed on the way out."""

  def __init__(self, step, num_pages: int, dtype: str):
    config = paged_jax.CacheConfig(
      num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, num_pages=num_pages, num_rows=ROWS,
      max_length=2 * LENGTH, dtype=dtype,
    )  # fmt: skip
    self.cache, _ = paged_jax.jitted.extend(
      paged_jax.jitted.init(config), jnp.full(ROWS, LENGTH, jnp.int32)
    )
    run = jax.jit(lambda cache: jax.lax.scan(step, cache, None, length=STEPS), donate_argnums=0)
    self.run = run.lower(self.cache).compile()
    self.temp = self.run.memory_analysis().temp_size_in_bytes
    self.once()

  def once(self) -> float:
    held = {}

    def run():
      held["out"] = self.run(self.cache)
      return held["out"]

    took = measure.seconds(run)
    self.cache, ok = held["out"]
    assert bool(ok.all())
    self.cache, _ = paged_jax.jitted.trim(self.cache, jnp.full(ROWS, LENGTH, jnp.int32))
    jax.block_until_ready(self.cache)
    return took / STEPS


def measured(name: str, step, dtype: str, pages: int, rounds: int) -> dict:
  loops = [Loop(step, n, dtype) for n in (pages, FACTOR * pages)]
  times = [[], []]
  for _ in range(rounds):
    for loop, each in zip(loops, times):
      each.append(loop.once())
  small, large = (sorted(each)[rounds // 2] for each in times)
  return {
    "step": name,
    "dtype": dtype,
    "pool_mb": loops[0].cache.pages.kv.nbytes / 2**20,
    "small_us": small * 1e6,
    "large_us": large * 1e6,
    "time_growth": large / small,
    "temp_growth": loops[1].temp - loops[0].temp,
  }


def main():
  options = measure.arguments(__doc__)
  rows = []
  for dtype in ("float32", "bfloat16"):
    config = paged_jax.CacheConfig(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype)
    pages = -(-4 * measure.last_level_cache() // config.page_bytes)
    for step in (grow, write, decode):
      rows.append(measured(step.__name__, step, dtype, pages, options.rounds))
  summary = {name: max(row[name] for row in rows) for name in ("temp_growth", "time_growth")}
  measure.report(rows, summary, as_json=options.json)


if __name__ == "__main__":
  main()
