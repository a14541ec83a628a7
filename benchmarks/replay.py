"""A trace of requests in simulated time: the manager decides, a formula says how long a step takes.

The requests of `--trace` (Azure's csv or Mooncake's jsonl, an hour each; drawn from Azure's quantiles
without) come `--rate` times as fast as in the trace, `--repeat` times one after another, each time
with other contents. A `paged_jax.host.Manager` allocates, extends, swaps, evicts and shares for them.
Its cache has next to no bytes, and one of its tokens stands for 16 of the trace: a block of 512 tokens
of a Mooncake prompt is 32 of them, made from the block's id. Azure's prompts have no contents, so
they get no prefix cache. `simulation.py` says who runs when. A step takes, in seconds,

    a + b * rows that decode + c * tokens that they attend to + d * tokens of prompts

and each token that is swapped out or in takes e. `--costs a,b,c,d,e` gives them; without, they are
fitted to measured steps of the packaged model on this machine. The runs in `results/` have assumed
ones: an 8B model in bfloat16 at 60% of an H100's data sheet and 25 GB/s to the host, that is
8e-3,2.7e-5,6.5e-8,2.7e-5,5.2e-6 for Azure's hour, with a pool small enough to run out, and a third of
each for Mooncake's.

`page_utilisation`: live tokens over the tokens that the pages of running sequences could hold, shared
ones counted once; `pool_in_use`: those pages over all. `hit_rate`: prompt tokens found in the cache
over those asked for. `ttft`, `tpot`: simulated seconds to the first token, and per token after it. A
line of the table is a twelfth of the run. At the end the manager's audit must be clean.
"""

import argparse
import functools
import itertools
import pathlib
import time

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import lengths
import matplotlib
import numpy as np
import preemption
import scipy.optimize
from simulation import COUNTS, EVERY, GAUGES, SCALE, Costs, Sequence, Settings, Simulation, units

import paged_jax
from paged_jax import models

matplotlib.use("agg")
import matplotlib.pyplot as plt

BLOCK = 512 // SCALE  # of the manager's tokens in one of Mooncake's blocks
MOST_ROWS = 32  # that decode in a measured step
BLUE, LIGHT, DARK, ORANGE, GREEN = "#3b6fb6", "#c6d7ee", "#12305c", "#d9822b", "#3a9a5b"


# What a step costs


@functools.partial(jax.jit, donate_argnames="cache")
def forward(cache, decoder, growth, tokens, rows, positions):
  """One step for tokens [B] of any rows, as the engine's program does it."""
  cache, _ = paged_jax.extend(cache, growth)
  hidden, cache = decoder(tokens, cache, paged_jax.plan(cache, rows, positions))
  return cache, decoder.logits(hidden[: cache.ledger.num_rows])


def step_seconds(decoder, rows: int, prompt: int, context: int, rounds: int) -> float:
  """Median of steps that decode `rows` with `context` tokens each, beside a prompt."""
  s = MOST_ROWS + 1  # the last row is the prompt's
  config = models.cache_config(decoder.config, num_pages=s * preemption.LONGEST // 16, num_rows=s)
  cache = paged_jax.init(config)
  counts = np.zeros(s, np.int32)
  counts[:rows], counts[-1] = context, prompt
  cache, _ = paged_jax.jitted.extend(cache, counts)
  ids = np.append(np.arange(rows), np.full(prompt, s - 1)).astype(np.int32)
  positions = np.append(np.full(rows, context - 1), np.arange(prompt)).astype(np.int32)

  def step():
    nonlocal cache
    cache, logits = forward(cache, decoder, np.zeros_like(counts), ids % 100, ids, positions)
    return logits

  return measure.medians({"step": step}, rounds)["step"]


def measured(rounds: int) -> Costs:
  """Costs of the packaged model: least squares of relative errors, none negative."""
  decoder = models.load(models.embedded())
  points = list(itertools.product((1, 8, MOST_ROWS), (0, 128, 480), (32, 480)))
  seconds = np.array([step_seconds(decoder, *point, rounds) for point in points])
  features = np.array([(1, rows, rows * context, prompt) for rows, prompt, context in points])
  fitted, _ = scipy.optimize.nnls(features / seconds[:, None], np.ones(len(points)))
  swap = measure.medians({"swap": preemption.Sequence(decoder, 16, 480).swap}, rounds)["swap"]
  return Costs(*fitted.tolist(), swap / (2 * 480))


# Who comes


def sequences(trace: lengths.Trace, count: int, rate: float, repeat: int) -> list[Sequence]:
  """The first `count` requests, at their times."""
  times, sizes = trace.times[:count], trace.tokens[:count].tolist()
  blocks = None if trace.blocks is None else [np.array(ids) for ids in trace.blocks[:count]]
  num_ids = 1 + max(int(ids.max()) for ids in blocks) if blocks else 0
  offsets = np.arange(BLOCK, dtype=np.int32)
  found = []
  for turn in range(repeat):
    for i, (prompt, output) in enumerate(sizes):
      tokens = None
      if blocks:
        ids = (blocks[i] + turn * num_ids).astype(np.int32)
        tokens = (ids[:, None] * BLOCK + offsets).reshape(-1)[: units(prompt)]
      arrival = (turn * times[-1] + times[i]) / rate
      found.append(Sequence(len(found), arrival, prompt, output, tokens))
  return found


# What came out


def table(samples: list[dict], pool: int) -> list[dict]:
  """Twelve lines, of equal parts of the run."""
  lines = []
  for part in np.array_split(np.arange(len(samples)), min(12, len(samples))):
    of = [samples[i] for i in part]
    mean = {name: float(np.mean([each[name] for each in of])) for name in GAUGES}
    begin = samples[part[0] - 1] if part[0] else dict.fromkeys(COUNTS, 0)
    count = {name: of[-1][name] - begin[name] for name in COUNTS}
    lines.append({
      "hours": EVERY * (part[-1] + 1) / 3600,
      "live %": 100 * mean["live"] / pool,
      "mapped %": 100 * mean["mapped"] / pool,
      "used %": 100 * mean["used"] / pool,
      "running": mean["running"],
      "waiting": mean["waiting"],
      "swapped": mean["swapped"],
      "hits %": 100 * count["hit"] / max(1, count["asked"]),
      "preempted": count["swaps"] + count["recomputations"],
      "tokens/s": count["drawn"] / EVERY / len(of),
      "prompt tokens/s": count["prompt"] / EVERY / len(of),
    })  # fmt: skip
  return lines


def summary(run: Simulation, seconds: float) -> dict:
  count, samples = run.count, run.samples
  live, mapped = (sum(each[name] for each in samples) for name in ("live", "mapped"))
  return {
    "requests": len(run.ttft),
    "simulated_hours": run.now / 3600,
    "seconds_to_replay": seconds,
    "hit_rate": count["hit"] / max(1, count["asked"]),
    "page_utilisation": live / mapped,
    "pool_in_use": mapped / len(samples) / run.settings.pool,
    "swaps": count["swaps"],
    "recomputations": count["recomputations"],
    "most_at_once": count["most"],
    "tokens_per_s": count["drawn"] / run.now,
    **{
      f"{name}_{what}": float(value)
      for name, times in (("ttft", run.ttft), ("tpot", run.tpot))
      for what, value in (("mean", np.mean(times)), ("p99", np.percentile(times, 99)))
    },
  }


def picture(samples: list[dict], pool: int, path: pathlib.Path) -> None:
  """Memory and sequences (the most in each stretch of time), throughput, preemptions and hits."""
  width = -(-len(samples) // 150)  # samples in a point
  num_points = len(samples) // width
  parts = {
    name: np.array([each[name] for each in samples[: num_points * width]]).reshape(-1, width)
    for name in (*GAUGES, *COUNTS)
  }
  gauge = {name: parts[name].max(axis=1) for name in GAUGES}
  count = {name: np.diff(parts[name][:, -1], prepend=0) for name in COUNTS}
  seconds = EVERY * width
  hours = seconds * (np.arange(num_points) + 0.5) / 3600
  preempted, shared = (
    bool((count["swaps"] + count["recomputations"]).any()),
    bool(count["hit"].any()),
  )
  heights = [2, 1.4, 1] + [0.8] * (preempted + shared)
  fig, axes = plt.subplots(
    len(heights), 1, figsize=(9, 1.6 * sum(heights)), sharex=True, layout="constrained",
    height_ratios=heights,
  )  # fmt: skip
  memory, number, speed, *last = axes

  memory.axhline(pool / 1e3, color="gray", ls="--", lw=1, label="pool")
  if (gauge["used"] > gauge["mapped"]).any():
    memory.fill_between(hours, gauge["used"] / 1e3, color=LIGHT, lw=0, label="kept for prefixes")
  memory.fill_between(hours, gauge["mapped"] / 1e3, color=BLUE, lw=0, label="pages of sequences")
  memory.plot(hours, gauge["live"] / 1e3, color=DARK, lw=1, label="live tokens")
  memory.set(ylabel="thousands of tokens", ylim=(0, 1.05 * pool / 1e3))

  for name, color in (("running", BLUE), ("waiting", ORANGE), ("swapped", GREEN)):
    if gauge[name].any():
      number.plot(hours, gauge[name], color=color, lw=1.2, label=name)
  number.set(ylabel="sequences", ylim=(0, None))

  speed.plot(hours, count["prompt"] / seconds, color=ORANGE, lw=1.2, label="of prompts, computed")
  speed.plot(hours, count["drawn"] / seconds, color=BLUE, lw=1.2, label="drawn")
  lowest = max(1.0, np.median(count["drawn"] / seconds) / 10)
  speed.set(ylabel="tokens per second", yscale="log", ylim=(lowest, None))

  if preempted:
    ax, bottom = last[0], np.zeros(num_points)
    for name, color in (("swaps", GREEN), ("recomputations", ORANGE)):
      if count[name].any():
        ax.bar(hours, count[name], seconds / 3600, bottom, color=color, lw=0, label=name)
        bottom += count[name]
    ax.set(ylabel=f"preemptions\nin {seconds:.0f} s", ylim=(0, None))
  if shared:
    last[-1].plot(hours, 100 * count["hit"] / np.maximum(1, count["asked"]), color=BLUE, lw=1.2)
    last[-1].set(ylabel="prompt tokens\nhit, %", ylim=(0, None))
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(0, seconds * num_points / 3600)
    if ax.get_legend_handles_labels()[0]:
      ax.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=4, frameon=False, fontsize=8,
                handlelength=1.2, borderpad=0.2)  # fmt: skip
  axes[-1].set_xlabel("simulated hours")
  fig.align_ylabels(axes)
  fig.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--json", action="store_true", help="one JSON object as the last line")
  add("--rounds", type=int, default=15, help="turns of each measured step")
  add("--trace", type=pathlib.Path, help="Azure's csv or Mooncake's jsonl")
  add("--requests", type=int, default=10**9, help="only the first ones of the trace")
  add("--rate", type=float, default=1.0, help="how many times as fast they come")
  add("--repeat", type=int, default=1, help="how often the trace is replayed")
  add("--costs", type=_costs, help="a,b,c,d,e in seconds; measured without")
  add("--pool", type=int, default=2**19, help="tokens that all pages hold")
  add("--page", type=int, default=64, help=f"tokens per page, a multiple of {SCALE}")
  add("--num-rows", type=int, default=64, help="most sequences that run at once")
  add("--budget", type=int, default=2048, help="tokens of a step")
  add("--preemption", choices=("swap", "recompute"), default="swap")
  add("--picture", type=pathlib.Path, help="where to draw it")
  args = parser.parse_args(argv)
  costs = args.costs or measured(args.rounds)
  arrivals = sequences(lengths.trace(args.trace), args.requests, args.rate, args.repeat)
  settings = Settings(*(getattr(args, name) for name in Settings._fields))
  simulation = Simulation(arrivals, costs, settings)
  begin = time.perf_counter()
  simulation.run()
  seconds = time.perf_counter() - begin
  assert simulation.manager.audit().clean and len(simulation.ttft) == len(arrivals)
  if args.picture:
    picture(simulation.samples, args.pool, args.picture)
  found = summary(simulation, seconds) | {"rate": args.rate, "repeat": args.repeat}
  found |= settings._asdict() | costs._asdict()
  measure.report(table(simulation.samples, args.pool), found, as_json=args.json)


def _costs(text: str) -> Costs:
  return Costs(*map(float, text.split(",")))


if __name__ == "__main__":
  main()
