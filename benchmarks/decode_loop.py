"""How much of a decode step is the host's, by steps per dispatch?

The packaged model, 16 rows of 16-token pages, all decoding, one after another's prompt a token
longer. For each number of steps per dispatch: `speedup`, tokens per second over those of one step
per dispatch, and `host_share`, the part of the time that the host does not wait for a report (the
device may be busy then, too). A loop that comes back to the host whenever some row crosses a page
boundary does so every step here, since 16 rows at 16 different offsets cross one every step:
`speedup_over_boundaries` is the best over one step.
"""

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import statistics
import time

from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling

STEPS = (1, 8, 32, 128)
ROWS, NEW_TOKENS, SIZE = 16, 160, 16


def engine(model, num_steps: int) -> Engine:
  config = models.cache_config(
    model.config, num_pages=ROWS * 16, num_rows=ROWS, page_size=SIZE, max_length=256
  ).stored_for(jax.default_backend())
  return Engine(model, EngineConfig(config, num_steps=num_steps, prompt_sizes=(ROWS * SIZE,)))


def run(e: Engine) -> tuple[float, float]:
  """Seconds of a run, and those not waited."""
  prompts = [list(range(1, 2 + i)) for i in range(ROWS)]
  began, waited = time.perf_counter(), e.counts.seconds_waited
  e.generate(prompts, Sampling(max_new_tokens=NEW_TOKENS))
  seconds = time.perf_counter() - began
  return seconds, seconds - (e.counts.seconds_waited - waited)


def main():
  args = measure.arguments(__doc__.splitlines()[0])
  model = models.load(models.embedded())
  engines = {k: engine(model, k) for k in STEPS}
  for e in engines.values():
    e.warm_up()
    run(e)
  times = {k: [] for k in STEPS}
  for _ in range(max(3, args.rounds // 3)):
    for k, e in engines.items():
      times[k].append(run(e))
  median = {k: tuple(map(statistics.median, zip(*each))) for k, each in times.items()}
  one = median[1][0]
  rows = [
    {
      "steps": k,
      "ms_per_step": 1e3 * seconds / NEW_TOKENS,
      "speedup": one / seconds,
      "host_share": host / seconds,
    }
    for k, (seconds, host) in median.items()
  ]
  summary = {
    "speedup_over_boundaries": max(row["speedup"] for row in rows),
    "host_share_8": rows[1]["host_share"],
    "host_share_128": rows[-1]["host_share"],
  }
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
