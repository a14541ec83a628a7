"""Continuous batching on a `paged_jax.host.Manager` in simulated time.

First come, first served, as in the engine: while a step has room for more tokens, those who wait get a
row, the prefixes that are cached and pages for their prompt, which is computed in pieces; where a page
is missing, the newest is preempted. The manager's cache has next to no bytes, and one of its tokens
stands for `SCALE` of a request's.

    # arrivals ──▶ waiting ──▶ running ──▶ ended
    #                 ▲           │
    #                 └─ preempted, swapped out or to be computed again
"""

import bisect
import collections
import dataclasses
from typing import NamedTuple

import numpy as np

import paged_jax
from paged_jax.host import Handle, Manager, ManagerConfig, Request, errors

SCALE = 16  # tokens of a request in one of the manager's
AHEAD = 8  # decode steps that must have their pages before one more sequence comes in
EVERY = 2.0  # simulated seconds between samples
GAUGES = ("live", "mapped", "used", "running", "waiting", "swapped")  # the first three in tokens
COUNTS = ("asked", "hit", "swaps", "recomputations", "drawn", "prompt")  # since the beginning


class Costs(NamedTuple):
  """Seconds."""

  step: float
  row: float  # that decodes
  context: float  # token that such a row attends to
  prompt: float  # token of a prompt
  swap: float  # token that leaves or comes back


class Settings(NamedTuple):
  """What there is to run on, and how."""

  pool: int  # tokens that all pages hold
  page: int  # tokens per page, a multiple of SCALE
  num_rows: int  # most sequences that run at once
  budget: int  # tokens of a step
  preemption: str  # swap or recompute


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


def units(num_tokens: int) -> int:
  """The manager's tokens for so many of the trace."""
  return -(-num_tokens // SCALE)


class Simulation:
  """Continuous batching on a manager, in simulated time."""

  def __init__(self, arrivals: list[Sequence], costs: Costs, settings: Settings):
    longest = max(units(each.prompt + each.output) for each in arrivals)
    prefixes = arrivals[0].tokens is not None
    self.config = paged_jax.CacheConfig(
      num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32", page_size=settings.page // SCALE,
      num_pages=settings.pool // settings.page, num_rows=settings.num_rows, max_length=longest,
    )  # fmt: skip
    if self.config.pages_per_row > self.config.num_pages:
      raise ValueError(
        f"the longest request needs {self.config.pages_per_row * settings.page} tokens"
      )
    options = ManagerConfig(
      num_host_pages=4 * self.config.num_pages, prefix_cache=prefixes, max_prefixes=len(arrivals)
    )
    self.manager = Manager(self.config, options, clock=lambda: self.now)
    self.costs, self.settings = costs, settings
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
    budget = self.settings.budget - sum(
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
    return self.manager.settle() >= num_pages or self.manager.available_pages >= num_pages

  def advance(self) -> None:
    """One step with pieces of prompts, or all decode steps to the next event."""
    num_steps = self.secure()
    if not self.running:
      return  # the only one was preempted
    decoding = [each for each in self.running if each.decoding]
    writing = [each for each in self.running if not each.decoding]
    left = self.settings.budget - len(decoding)
    for sequence in writing:
      piece = max(0, min(left, sequence.known - sequence.computed))
      sequence.computed += piece
      left -= piece
      if sequence.decoding:
        self.store(sequence)
    computed = self.settings.budget - len(decoding) - left
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
    if self.settings.preemption == "swap" and sequence.decoding:
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
      pages = np.array(sequence.handle.pages, int)
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
