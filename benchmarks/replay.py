"""A trace of requests in simulated time: the manager decides, a formula says how long a step takes.

The requests of `--trace` (Azure's csv or Mooncake's jsonl, an hour each; drawn from Azure's quantiles
without) come `--rate` times as fast as in the trace, `--repeat` times one after another, each time
with other contents. A `paged_jax.host.Manager` allocates, extends, swaps, evicts and shares for them.
Its cache has next to no bytes, and one of its tokens stands for 16 of the trace: a block of 512 tokens
of a Mooncake prompt is 32 of them, made from the block's id. Azure's prompts have no contents, so
they get no prefix cache. A step takes, in seconds,

    a + b * rows that decode + c * tokens that they attend to + d * tokens of prompts

and each token that is swapped out or in takes e. `--costs a,b,c,d,e` gives them; without, they are
fitted to measured steps of the packaged model on this machine.

Scheduling is first come, first served, as in the engine: while a step has room for more tokens
(`--budget`), those who wait get a row, the prefixes that are cached and pages for their prompt, which
is computed in pieces; where a page is missing, the newest is preempted (`--preemption`).

`page_utilisation`: live tokens over the tokens that the pages of running sequences could hold, shared
ones counted once; `pool_in_use`: those pages over all. `hit_rate`: prompt tokens found in the cache
over those asked for. `ttft`, `tpot`: simulated seconds to the first token, and per token after it. A
line of the table is a twelfth of the run. At the end the manager's audit must be clean.
"""

import argparse
import bisect
import collections
import dataclasses
import functools
import pathlib
import time
from typing import NamedTuple

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import lengths
import matplotlib
import numpy as np
import preemption
import scipy.optimize

import paged_jax
from paged_jax import models
from paged_jax.host import Handle, Manager, ManagerConfig, Request, errors

matplotlib.use("agg")
import matplotlib.pyplot as plt

SCALE = 16  # tokens of the trace in one of the manager's
BLOCK = 512 // SCALE  # of the manager's tokens in one of Mooncake's blocks
EVERY = 2.0  # simulated seconds between samples
SETTINGS = ("rate", "repeat", "pool", "page", "num_rows", "budget", "preemption")
AHEAD = 8  # decode steps that must have their pages before one more sequence comes in
GAUGES = ("live", "mapped", "used", "running", "waiting", "swapped")  # the first three in tokens
BLUE, LIGHT, DARK, ORANGE, GREEN = "#3b6fb6", "#c6d7ee", "#12305c", "#d9822b", "#3a9a5b"
COUNTS = ("asked", "hit", "swaps", "recomputations", "drawn", "prompt")  # since the beginning


# What a step costs


class Costs(NamedTuple):
  """Seconds."""

  step: float
  row: float  # that decodes
  context: float  # token that such a row attends to
  prompt: float  # token of a prompt
  swap: float  # token that leaves or comes back


@functools.partial(jax.jit, donate_argnames="cache")
def forward(cache, decoder, growth, tokens, rows, positions):
  """One step for tokens [B] of any rows, as the engine's program does it."""
  cache, _ = paged_jax.extend(cache, growth)
  hidden, cache = decoder(tokens, cache, paged_jax.plan(cache, rows, positions))
  return cache, decoder.logits(hidden[: cache.ledger.num_rows])


def measured(rounds: int) -> Costs:
  """Costs of the packaged model, by least squares of relative errors."""
  decoder = models.load(models.embedded())
  s, longest = 33, preemption.LONGEST  # the last row is the prompt's
  config = models.cache_config(decoder.config, num_pages=s * longest // 16, num_rows=s)
  features, seconds = [], []
  for rows in (1, 8, 32):
    for prompt in (0, 128, 480):
      for context in (32, 480):
        cache = paged_jax.init(config.stored_for(jax.default_backend()))
        counts = np.zeros(s, np.int32)
        counts[:rows], counts[-1] = context, prompt
        cache, _ = paged_jax.jitted.extend(cache, counts)
        ids = np.append(np.arange(rows), np.full(prompt, s - 1)).astype(np.int32)
        positions = np.append(np.full(rows, context - 1), np.arange(prompt)).astype(np.int32)
        times = []
        for _ in range(1 + rounds):
          begin = time.perf_counter()
          out = forward(cache, decoder, np.zeros_like(counts), np.ones_like(ids), ids, positions)
          cache, _ = jax.block_until_ready(out)
          times.append(time.perf_counter() - begin)
        features.append((1, rows, rows * context, prompt))
        seconds.append(np.median(times[1:]))
  relative = np.array(features) / np.array(seconds)[:, None]
  fitted, _ = scipy.optimize.nnls(relative, np.ones(len(seconds)))
  swapped = preemption.Sequence(decoder, 16, 480)
  swap = measure.medians({"swap": swapped.swap}, rounds)["swap"] / (2 * 480)
  return Costs(*fitted.tolist(), swap)


# Who comes


@dataclasses.dataclass(eq=False)
class Sequence:
  """One request and how far it is, in tokens of the trace.

  # prompt    0 ................ p-2 | p-1    the last token goes with the first decode step
  # computed  0 ...... computed
  """

  number: int  # in order of arrival
  arrival: float
  prompt: int
  output: int
  tokens: np.ndarray | None  # the manager's, of the prompt
  handle: Handle | None = None
  swapped: bool = False
  computed: int = 0
  drawn: int = 0
  units: int = 0  # the manager's tokens that it has room for
  first: float | None = None  # when its first token came

  @property
  def known(self) -> int:
    """Tokens that must be in the cache before it can decode."""
    return self.prompt - 1 + self.drawn

  @property
  def decoding(self) -> bool:
    return self.computed == self.known


def sequences(trace: lengths.Trace, count: int, rate: float, repeat: int) -> list[Sequence]:
  """The first `count` requests, at their times."""
  times, sizes = trace.times[:count], trace.tokens[:count].tolist()
  blocks = None if trace.blocks is None else [np.array(ids) for ids in trace.blocks[:count]]
  period, most = times[-1] + EVERY, 1 + max(ids.max() for ids in blocks) if blocks else 0
  offsets = np.arange(BLOCK, dtype=np.int32)
  found = []
  for turn in range(repeat):
    for i, (prompt, output) in enumerate(sizes):
      tokens = None
      if blocks:
        ids = (blocks[i] + turn * most).astype(np.int32)
        tokens = (ids[:, None] * BLOCK + offsets).reshape(-1)[: units(prompt)]
      arrival = (turn * period + times[i]) / rate
      found.append(Sequence(len(found), arrival, prompt, output, tokens))
  return found


def units(num_tokens: int) -> int:
  """The manager's tokens for so many of the trace."""
  return -(-num_tokens // SCALE)


# Who runs


class Simulation:
  """Continuous batching on a manager, in simulated time."""

  def __init__(self, arrivals: list[Sequence], costs: Costs, args: argparse.Namespace):
    longest = max(units(each.prompt + each.output) for each in arrivals)
    prefixes = arrivals[0].tokens is not None
    self.config = paged_jax.CacheConfig(
      num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32", page_size=args.page // SCALE,
      num_pages=args.pool // args.page, num_rows=args.num_rows, max_length=longest,
    )  # fmt: skip
    if self.config.pages_per_row > self.config.num_pages:
      raise ValueError(f"the longest request needs {self.config.pages_per_row * args.page} tokens")
    options = ManagerConfig(
      num_host_pages=4 * self.config.num_pages, prefix_cache=prefixes, max_prefixes=len(arrivals)
    )
    self.manager = Manager(self.config, options, clock=lambda: self.now)
    self.costs, self.budget, self.swapping = costs, args.budget, args.preemption == "swap"
    self.now = 0.0
    self.arrivals = collections.deque(arrivals)
    self.waiting: list[Sequence] = []  # these two in order of arrival
    self.running: list[Sequence] = []
    self.blocked = False  # no room for the first in line until somebody ends
    self.count = collections.Counter()
    self.ttft: list[float] = []
    self.tpot: list[float] = []
    self.samples: list[dict] = []

  def run(self) -> None:
    while self.arrivals or self.waiting or self.running:
      while self.arrivals and self.arrivals[0].arrival <= self.now:
        bisect.insort(self.waiting, self.arrivals.popleft(), key=_number)
      self.admit()
      if self.running:
        self.advance()
      else:
        self.now = self.arrivals[0].arrival
      self.sample()

  def admit(self) -> None:
    """Rows and pages to those first in line, while the next step has room for their prompts."""
    budget = self.budget - sum(
      1 if each.decoding else each.known - each.computed for each in self.running
    )
    while self.waiting and budget > 0 and len(self.running) < self.config.num_rows:
      if self.running and self.blocked:
        return
      sequence = self.waiting[0]
      self.blocked = not (self.resume if sequence.swapped else self.begin)(sequence)
      if not self.blocked:
        bisect.insort(self.running, self.waiting.pop(0), key=_number)
        budget -= max(1, sequence.known - sequence.computed)
        self.count["most"] = max(self.count["most"], len(self.running))

  def begin(self, sequence: Sequence) -> bool:
    """Room for all that a sequence knows, behind what is cached of it; whether there was any."""
    wanted = units(sequence.known)
    request = Request(sequence.number, wanted, sequence.tokens)
    try:
      handle = self.manager.allocate(request)
    except errors.OutOfPages:
      if not self.running:
        raise
      return False
    if self.running and not self.room(0):
      self.manager.deallocate(sequence.number)
      return False
    sequence.handle, sequence.units = handle, wanted
    sequence.computed = min(sequence.known, handle.num_cached * SCALE)
    if not sequence.drawn:
      self.count["asked"] += sequence.prompt
      self.count["hit"] += sequence.computed
    return True

  def resume(self, sequence: Sequence) -> bool:
    """Brings a swapped sequence back, if there is room."""
    if self.running and not self.room(self.pages(sequence.units)):
      return False
    self.manager.swap_in(sequence.handle)
    sequence.swapped = False
    self.now += self.costs.swap * sequence.computed
    return True

  def pages(self, num_units: int) -> int:
    return -(-num_units // self.config.page_size)

  def room(self, num_pages: int) -> bool:
    """Whether so many pages, and what all take in the next steps, are to be had for the asking."""
    each = [x.units for x in self.running]
    num_pages += 1 + sum(self.pages(x + units(AHEAD)) - self.pages(x) for x in each)
    return self.manager.settle() >= num_pages or self.manager.free_pages >= num_pages

  def advance(self) -> None:
    """One step with pieces of prompts, or all decode steps to the next event."""
    num_steps = self.secure()
    if not self.running:
      return  # the only one was preempted
    decoding = [each for each in self.running if each.decoding]
    writing = [each for each in self.running if not each.decoding]
    left = self.budget - len(decoding)
    for sequence in writing:
      piece = max(0, min(left, sequence.known - sequence.computed))
      sequence.computed += piece
      left -= piece
      if sequence.decoding:
        self.store(sequence)
    computed = self.budget - len(decoding) - left
    ends = self.now + np.cumsum(self.seconds(decoding, num_steps, computed))
    self.count["prompt"] += computed
    self.count["drawn"] += num_steps * len(decoding)
    self.now = float(ends[-1])
    for sequence in decoding:
      if sequence.first is None:
        sequence.first = float(ends[0])
      sequence.computed += num_steps
      sequence.drawn += num_steps
    self.end([each for each in decoding if each.drawn == each.output])

  def seconds(self, decoding: list[Sequence], num_steps: int, prompt: int = 0) -> np.ndarray:
    """What each of the next steps takes."""
    costs, context = self.costs, sum(each.computed + 1 for each in decoding)
    rest = costs.step + costs.row * len(decoding) + costs.prompt * prompt
    return rest + costs.context * (context + len(decoding) * np.arange(num_steps))

  def secure(self) -> int:
    """Sees to the pages of the next decode steps, by preemption if need be; how many steps."""
    num_steps = self.until_event()
    while self.running:
      growth = {
        each.handle: units(each.computed + num_steps) - each.units
        for each in self.running
        if each.decoding and units(each.computed + num_steps) > each.units
      }
      try:
        self.manager.extend_many(growth)
      except errors.OutOfPages:
        if num_steps > 1:
          num_steps //= 2
        else:
          self.preempt(self.running.pop())
        continue
      for each in self.running:
        each.units += growth.get(each.handle, 0)
      break
    return num_steps

  def until_event(self) -> int:
    """Decode steps until a prompt is to be computed, or a sequence ends."""
    if not all(each.decoding for each in self.running):
      return 1
    num_steps = min(each.output - each.drawn for each in self.running)
    full = self.blocked or len(self.running) == self.config.num_rows
    if self.arrivals and not full:
      ends = self.now + np.cumsum(self.seconds(self.running, num_steps))
      num_steps = min(num_steps, 1 + int(np.searchsorted(ends, self.arrivals[0].arrival)))
    return num_steps

  def preempt(self, sequence: Sequence) -> None:
    """The sequence's pages are for others, and it waits."""
    bisect.insort(self.waiting, sequence, key=_number)
    if self.swapping and sequence.decoding:
      try:
        self.manager.swap_out(sequence.handle)
      except errors.OutOfHostPages:
        pass
      else:
        sequence.swapped = True
        self.now += self.costs.swap * sequence.computed
        self.count["swaps"] += 1
        return
    self.manager.deallocate(sequence.number)
    sequence.handle, sequence.computed = None, 0
    self.count["recomputations"] += 1

  def store(self, sequence: Sequence) -> None:
    """Lets others start on the whole pages of a prompt."""
    whole = units(sequence.prompt - 1) // self.config.page_size * self.config.page_size
    if sequence.tokens is not None and whole:
      self.manager.store_prefix(sequence.handle, sequence.tokens[:whole])

  def end(self, ended: list[Sequence]) -> None:
    if ended:
      self.manager.deallocate_many([each.number for each in ended])
      self.running = [each for each in self.running if each not in ended]
      self.blocked = False
    for sequence in ended:
      self.ttft.append(sequence.first - sequence.arrival)
      if sequence.output > 1:
        self.tpot.append((self.now - sequence.first) / (sequence.output - 1))

  def sample(self) -> None:
    """What there is to see, at every tick of the simulated clock that has passed."""
    if self.now < EVERY * len(self.samples):
      return
    size, num_pages = self.config.page_size * SCALE, self.config.num_pages
    live = np.zeros(num_pages, int)  # tokens of each page
    mapped = np.zeros(num_pages, bool)
    for sequence in self.running:
      pages = np.array(self.manager.pages(sequence.handle), int)
      mapped[pages] = True
      tokens = np.clip(sequence.computed - size * np.arange(len(pages)), 0, size)
      live[pages] = np.maximum(live[pages], tokens)
    swapped = sum(each.swapped for each in self.waiting)
    sample = {
      "live": int(live.sum()),
      "mapped": size * int(mapped.sum()),
      "used": size * (num_pages - self.manager.settle()),
      "running": len(self.running),
      "waiting": len(self.waiting) - swapped,
      "swapped": swapped,
      **{name: self.count[name] for name in COUNTS},
    }
    while self.now >= EVERY * len(self.samples):
      self.samples.append(sample)


def _number(sequence: Sequence) -> int:
  return sequence.number


# What came out


def table(samples: list[dict], pool: int) -> list[dict]:
  """Twelve lines, of equal parts of the run."""
  lines = []
  for part in np.array_split(np.arange(len(samples)), min(12, len(samples))):
    of = [samples[i] for i in part]
    mean = {name: float(np.mean([each[name] for each in of])) for name in GAUGES}
    begin, end = samples[max(0, part[0] - 1)], of[-1]
    count = {name: end[name] - begin[name] for name in COUNTS}
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


def summary(run: Simulation, pool: int, seconds: float) -> dict:
  count, samples = run.count, run.samples
  live, mapped = (sum(each[name] for each in samples) for name in ("live", "mapped"))
  return {
    "requests": len(run.ttft),
    "simulated_hours": run.now / 3600,
    "seconds_to_replay": seconds,
    "hit_rate": count["hit"] / max(1, count["asked"]),
    "page_utilisation": live / mapped,
    "pool_in_use": mapped / len(samples) / pool,
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
  """Memory, sequences, throughput, preemptions and hits over simulated hours."""
  width = -(-len(samples) // 150)  # samples in a point
  num_points = len(samples) // width
  parts = {
    name: np.array([each[name] for each in samples[: num_points * width]]).reshape(-1, width)
    for name in (*GAUGES, *COUNTS)
  }
  gauge = {name: parts[name].mean(axis=1) for name in GAUGES}
  count = {name: np.diff(parts[name][:, -1], prepend=0) for name in COUNTS}
  seconds = EVERY * width
  hours = seconds * (np.arange(num_points) + 0.5) / 3600
  heights = [2, 1.4, 1, 0.8] + [0.8] * bool(count["hit"].any())
  fig, axes = plt.subplots(
    len(heights), 1, figsize=(9, 1.6 * sum(heights)), sharex=True, layout="constrained",
    height_ratios=heights,
  )  # fmt: skip
  memory, number, speed, preempted, *hits = axes

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

  bottom = np.zeros(num_points)
  for name, color in (("swaps", GREEN), ("recomputations", ORANGE)):
    if count[name].any():
      preempted.bar(hours, count[name], seconds / 3600, bottom, color=color, lw=0, label=name)
      bottom += count[name]
  preempted.set(ylabel=f"preemptions\nin {seconds:.0f} s", ylim=(0, max(1, *bottom)))

  for ax in hits:
    ax.plot(hours, 100 * count["hit"] / np.maximum(1, count["asked"]), color=BLUE, lw=1.2)
    ax.set(ylabel="prompt tokens\nhit, %", ylim=(0, None))
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0)
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
  simulation = Simulation(arrivals, costs, args)
  begin = time.perf_counter()
  simulation.run()
  seconds = time.perf_counter() - begin
  assert simulation.manager.audit().clean and len(simulation.ttft) == len(arrivals)
  if args.picture:
    picture(simulation.samples, args.pool, args.picture)
  settings = {name: getattr(args, name) for name in SETTINGS}
  found = summary(simulation, args.pool, seconds) | settings | costs._asdict()
  measure.report(table(simulation.samples, args.pool), found, as_json=args.json)


def _costs(text: str) -> Costs:
  return Costs(*map(float, text.split(",")))


if __name__ == "__main__":
  main()
