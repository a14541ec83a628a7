"""What does the prefix cache give when prompts begin alike, and what does it cost when none do?

The packaged model. `shared`: a cold burst of requests, each with the same 200 tokens and 24 of its
own, 32 new tokens, pages for half of them at once. With the prefix cache over without:
`throughput_ratio` (new tokens per second), `ttft_ratio` (median seconds to the first token),
`tpot_p99_ratio` (99th percentile of the seconds per token after it). `again`: the same prompts a
second time, all of them cached with their logits. `distinct`: no two prompts begin alike;
`cost_at_zero_hits` is the part of the time spent in the prefix cache, timed directly around every
lookup, store, eviction, hold and drop; `cpu_at_zero_hits` counts only the seconds of them in which the
thread had a core, which on a CPU the device's threads want, too.

The seed's successor on such a burst: throughput 1.24, TTFT 0.27, TPOT p99 22 times worse.
"""

import functools
import time

import measure  # first: it sets XLA's flags
import numpy as np

from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.host import ManagerConfig

SHARED, OWN, NEW_TOKENS, SIZE, ROWS = 200, 24, 32, 16, 64
PAGES = ROWS * -(-(SHARED + OWN + NEW_TOKENS) // SIZE)


def prompts(count: int, *, shared: bool) -> list[list[int]]:
  rng = np.random.default_rng(0)
  system = rng.integers(0, 512, SHARED).tolist()
  whole = rng.integers(0, 512, (count, SHARED + OWN)).tolist()
  return [[*system, *each[SHARED:]] if shared else each for each in whole]


def engine(model, *, prefix_cache: bool) -> Engine:
  config = models.cache_config(
    model.config, num_pages=PAGES, num_rows=ROWS, page_size=SIZE, max_length=512
  )
  options = ManagerConfig(prefix_cache=prefix_cache, max_prefixes=4096)
  e = Engine(model, EngineConfig(config, options, prompt_sizes=(32, 128, 512)))
  e.warm_up()
  return e


def burst(e: Engine, texts: list[list[int]]) -> dict[str, float]:
  """All requests at once: new tokens per second, and percentiles of TTFT and TPOT."""
  began = time.perf_counter()
  times = [[] for _ in texts]

  def on_token(number, nth, tokens, logprobs):
    times[number].extend([time.perf_counter() - began] * len(tokens))

  for number, text in enumerate(texts):
    told = functools.partial(on_token, number)
    e.submit(text, Sampling(max_new_tokens=NEW_TOKENS), on_token=told)
  while e.step():
    pass
  seconds = time.perf_counter() - began
  first = [each[0] for each in times]
  later = [(each[-1] - each[0]) / (len(each) - 1) for each in times]
  return {
    "seconds": seconds,
    "tokens_per_s": len(texts) * NEW_TOKENS / seconds,
    "ttft_p50": float(np.median(first)),
    "tpot_p99": float(np.percentile(later, 99)),
  }


class Stopwatch:
  """Seconds spent in the prefix cache of an engine's manager, calls within calls counted once."""

  def __init__(self, e: Engine):
    self.seconds = self.cpu_seconds = 0.0
    self._depth = 0
    manager = e.manager
    for owner, names in (
      (manager, ("store_prefixes", "gc")),
      (manager._prefixes, ("match", "count_lookup")),
      (manager._reclaim, ("expire", "reclaim", "_settle")),
      (manager._index, ("find", "peek")),
      (manager._state.ledger, ("hold", "drop")),  # also when it follows a report
    ):
      for name in names:
        setattr(owner, name, self._timed(getattr(owner, name)))

  def _timed(self, call):
    @functools.wraps(call)
    def timed(*args, **kwargs):
      self._depth += 1
      began, cpu_began = time.perf_counter(), time.thread_time()
      try:
        return call(*args, **kwargs)
      finally:
        self._depth -= 1
        if not self._depth:
          self.seconds += time.perf_counter() - began
          self.cpu_seconds += time.thread_time() - cpu_began

    return timed


def main():
  args = measure.arguments(__doc__.splitlines()[0], requests=(int, 128, "how many"))
  model = models.load(models.embedded())
  engines = {on: engine(model, prefix_cache=on) for on in (True, False)}
  shared, distinct = (prompts(args.requests, shared=each) for each in (True, False))
  stopwatch = Stopwatch(engines[True])
  runs: dict[str, list[dict]] = {}

  def run(what: str, on: bool, texts) -> None:
    stopwatch.seconds = stopwatch.cpu_seconds = 0.0
    result = burst(engines[on], texts)
    result["prefix_share"] = stopwatch.seconds / result["seconds"]
    result["prefix_cpu_share"] = stopwatch.cpu_seconds / result["seconds"]
    runs.setdefault(what, []).append(result)

  for _ in range(1 + max(3, args.rounds // 3)):
    engines[True].manager.clear_prefixes()
    run("shared, on", True, shared)
    run("again, on", True, shared)
    run("shared, off", False, shared)
    engines[True].manager.clear_prefixes()
    run("distinct, on", True, distinct)
    run("distinct, off", False, distinct)
  median = {  # the first turn compiles
    what: {key: float(np.median([r[key] for r in each[1:]])) for key in each[0]}
    for what, each in runs.items()
  }
  on, off = median["shared, on"], median["shared, off"]
  summary = {
    "throughput_ratio": on["tokens_per_s"] / off["tokens_per_s"],
    "ttft_ratio": on["ttft_p50"] / off["ttft_p50"],
    "tpot_p99_ratio": on["tpot_p99"] / off["tpot_p99"],
    "throughput_ratio_again": median["again, on"]["tokens_per_s"] / off["tokens_per_s"],
    "cost_at_zero_hits": median["distinct, on"]["prefix_share"],
    "cpu_at_zero_hits": median["distinct, on"]["prefix_cpu_share"],
  }
  measure.report([{"what": w} | r for w, r in median.items()], summary, as_json=args.json)


if __name__ == "__main__":
  main()
