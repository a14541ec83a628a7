"""How much of a decode step is the host's, by steps per dispatch?

The packaged model, 16 rows of 16-token pages, all decoding, each prompt a token longer than the one
before. For each number of steps per dispatch: `speedup`, tokens per second over those of one step
per dispatch, and `host_share`: 1 - (seconds of the same device programs, recorded and dispatched
again back to back) / (seconds of the engine). A loop that comes back to the host whenever some row
crosses a page boundary does so every step here, since 16 rows at 16 different offsets cross one
every step: `speedup_over_boundaries` is the best over one step.
"""

import functools
import statistics
import time

import measure  # first: it sets XLA's flags
import tape

from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.host import ManagerConfig

STEPS = (1, 8, 32, 128)
ROWS, NEW_TOKENS, SIZE = 16, 160, 16


def engine(model, num_steps: int) -> Engine:
  config = models.cache_config(
    model.config, num_pages=ROWS * 16, num_rows=ROWS, page_size=SIZE, max_length=256
  )
  options = ManagerConfig(prefix_cache=False)
  return Engine(model, EngineConfig(config, options, num_steps, prompt_sizes=(ROWS * SIZE,)))


def run(e: Engine) -> float:
  """Seconds of a run."""
  prompts = [list(range(1, 2 + i)) for i in range(ROWS)]
  began = time.perf_counter()
  e.generate(prompts, Sampling(max_new_tokens=NEW_TOKENS))
  return time.perf_counter() - began


def main():
  args = measure.arguments(__doc__.splitlines()[0])
  model = models.load(models.embedded())
  engines = {k: engine(model, k) for k in STEPS}
  tapes = {}
  for k, e in engines.items():
    e.warm_up()
    run(e)
    tapes[k] = tape.record(e, functools.partial(run, e))
  times = {k: [] for k in STEPS}
  for _ in range(max(3, args.rounds // 3)):
    for k, e in engines.items():
      times[k].append((run(e), tapes[k].seconds()))
  median = {k: statistics.median(whole for whole, _ in each) for k, each in times.items()}
  rows = [
    {
      "steps": k,
      "ms_per_step": 1e3 * median[k] / NEW_TOKENS,
      "speedup": median[1] / median[k],
      "host_share": statistics.median(1 - bare / whole for whole, bare in each),
    }
    for k, each in times.items()
  ]
  summary = {
    "speedup_over_boundaries": max(row["speedup"] for row in rows),
    "host_share_8": rows[1]["host_share"],
    "host_share_128": rows[-1]["host_share"],
  }
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
