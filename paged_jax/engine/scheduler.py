"""Who runs: rows and pages for those first in line, taken from those behind them if need be.

Nothing here looks at the device. What runs ahead of the reports is covered by bounds: a call is
dispatched only when the pages that it, and every call in flight, may take are certainly there.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from paged_jax.engine.calls import Calls, Piece
from paged_jax.engine.config import Counts, EngineConfig
from paged_jax.engine.requests import Body, Queue, Sample, SequenceId
from paged_jax.host import Handle, Manager, Prefix, Request, errors

_CALLS_AHEAD = 4  # for so many prefixes are evicted at once: before, all reports must be read


class Scheduler:
  """Admission, preemption, and what samples leave behind."""

  def __init__(
    self, manager: Manager, queue: Queue, calls: Calls, config: EngineConfig, counts: Counts
  ):
    self.manager, self.queue, self.calls, self.config = manager, queue, calls, config
    self.counts = counts
    self.ended: list[Sample] = []  # they have their completion, and still hold something
    self.swap_seconds = 0.0  # per page and way
    self.prompt_seconds = 0.0  # per token
    self._unstored: list[Sample] = []  # their prompt is in the cache, not in the prefix index
    self._refused: tuple[Sample | None, int] = (None, 0)  # who, with how many pages to be had
    self.refusal: errors.CacheError | None = None  # what the manager said to the last one refused
    self._ids = itertools.count()

  # Room

  def pages(self, num_tokens: int) -> int:
    """Pages that so many tokens fill."""
    return -(-num_tokens // self.config.cache.page_size)

  def most_pages(self, prompt_length: int, num_beams: int, num_tokens: int) -> int:
    """Most pages that a sample, or the beams of a search together, hold at so many tokens each."""
    shared = prompt_length // self.config.cache.page_size if num_beams > 1 else 0
    return shared + num_beams * (self.pages(num_tokens) - shared)

  def growth(self, num_steps: int) -> int:
    """Most pages that a call of so many steps may take, with those in flight."""
    pages, width = 0, self.calls.width
    lengths = np.zeros(self.config.cache.num_rows, np.int32)
    for row, sample in self.queue.running.items():
      steps = sample.pending
      if num_steps and sample.draws:
        steps += num_steps
      if not steps:
        continue
      if not sample.searching:
        lengths[row] = min(sample.length - 1 + steps * width, sample.limit)
      elif sample is sample.beams[0]:
        longest = max(beam.length for beam in sample.beams)
        most = min(longest - 1 + steps * width, sample.limit)
        handles = [beam.handle for beam in sample.beams if beam.handle]
        pages += self.manager.pages_to_search(handles, most, len(sample.entry.prompt))
    return pages + self.manager.pages_to_reach(lengths)

  def secure(self, num_steps: int) -> bool:
    """Whether a call of so many steps certainly finds its pages."""
    return self.growth(num_steps) <= self.manager.num_free

  def make_room(self, num_steps: int) -> tuple[Sample, errors.OutOfPages] | None:
    """Sees to it that the next call finds its pages: evicts prefixes, then preempts.

    All calls must have been read.

    Returns:
      The only sample that runs, and why, if it cannot go on: what is missing is pinned, or held by
      others than the engine.
    """
    while (needed := self.growth(num_steps)) > self.manager.num_free:
      self.manager.gc(self.growth(_CALLS_AHEAD * num_steps))
      if needed <= self.manager.num_free:
        break
      victim = self.queue.last()
      if len(self.queue.running) > len(victim.beams):
        self.preempt(victim)
      elif not self.manager.clear_prefixes(pinned=False):  # one may share its last page
        return victim, errors.OutOfPages(needed=needed, free=self.manager.num_free)
    return None

  def _available(self) -> int:
    """Pages that somebody new could hope for, were all reports read."""
    ended = sum(self.pages(sample.length) for sample in self.ended if sample.row >= 0)
    return self.manager.num_free + self.manager.num_idle + ended - self.growth(0)

  # Admission

  def _beginnings(self) -> tuple[set, set]:
    """First pages of texts on rows: those that are just computed, and others could share
    afterwards, and those that were cached."""
    if not self.config.options.prefix_cache:
      return set(), set()
    size, rows = self.config.cache.page_size, self.queue.running.values()
    cached = {x.entry.beginning for x in rows if x.handle and x.handle.num_cached >= size}
    return {x.entry.beginning for x in rows if x.unread} - cached - {None}, cached

  def _may_begin(self, sample: Sample, being_read: set) -> bool:
    """Whether a waiting sample need not wait for another one's text, to start on its pages."""
    origin = sample.origin
    soon = origin is not None and not (origin.decoding or origin.resting or origin.completion)
    alone = sample.swapped or not (soon or sample.entry.beginning in being_read)
    return alone and not sample.resting

  def may_admit(self) -> bool:
    """Whether to try: somebody waits whose prompt the next call could begin with, and there is more
    room than when that one was refused."""
    if not self.queue.waiting:
      return False
    being_read, _ = self._beginnings()
    first = next((x for x in self.queue.waiting if self._may_begin(x, being_read)), None)
    if first is None:
      return False
    if self._overtakes(first):
      return True
    if sum(x.unread for x in self.queue.running.values()) >= self.config.prompt_sizes[-1]:
      return False
    ended = sum(sample.row >= 0 for sample in self.ended)
    vacant = self.manager.num_free_rows + ended
    sample, available = self._refused
    return vacant >= len(first.beams) and (first is not sample or self._available() > available)

  def admit(self) -> bool:
    """Rows and pages to those first in line, as long as there is room.

    Returns:
      False: All reports must be read before the first of those left is looked at, since it takes
      others' room, moves, or starts on another one's pages.
    """
    batch: list[Sample] = []
    (growth, room), (being_read, cached) = self._room(), self._beginnings()
    shares = self.config.options.prefix_cache
    self._refused = (None, 0)
    for sample in list(self.queue.waiting):
      alike = [x for x in batch if shares and x.entry.beginning == sample.entry.beginning]
      if alike and sample.entry.beginning not in cached | {None}:
        batch = self._allocate(batch, growth)  # one computes, or has, what this one could share
        being_read, cached = self._beginnings()
      if not self._may_begin(sample, being_read):
        continue
      needed = self.pages(sample.length + self.config.num_steps * self.calls.width) + 1
      plain = not (sample.handle or sample.origin or sample.searching)
      if plain and len(batch) < self.manager.num_free_rows and needed <= room:
        batch.append(sample)
        room -= self.pages(sample.length) + shares  # part of a page may have to be copied
        continue
      batch = self._allocate(batch, growth)
      overtakes = self._overtakes(sample)
      if self.manager.num_free_rows < len(sample.beams) and not overtakes:
        free = self.manager.num_free_rows
        self.refusal = errors.OutOfRows(needed=len(sample.beams), free=free)
        break
      if len(self.calls) and (overtakes or not plain):
        return False
      if not self._begin(sample):
        if self.manager.num_free_rows >= len(sample.beams):  # so it was for want of pages
          self._refused = (sample, self._available())
        break
      (growth, room), (being_read, cached) = self._room(), self._beginnings()
    self._allocate(batch, growth)
    self.counts.peak_running = max(self.counts.peak_running, len(self.queue.running))
    return True

  def _room(self) -> tuple[int, int]:
    """Pages that the next call may take, and those to be had that it leaves."""
    growth = self.growth(self.config.num_steps)
    return growth, self.manager.num_free + self.manager.num_reclaimable - growth

  def _allocate(self, samples: list[Sample], growth: int) -> list[Sample]:
    """Rows, and pages for the whole text, to samples for which there is room beside `growth`, what
    the next call may take; none are left."""
    if not samples:
      return []
    texts = [np.array(sample.text, np.int32) for sample in samples]
    requests = [Request(self._id(x), tokens=text) for x, text in zip(samples, texts)]
    spare = 0
    if self.manager.num_free < growth + sum(self.pages(len(text)) + 1 for text in texts):
      ahead = _CALLS_AHEAD * self.config.num_steps
      spare = self.growth(ahead) - growth + len(samples) * self.pages(ahead * self.calls.width)
    handles = self.manager.allocate_many(requests, reserve=growth, spare=spare, wait=False)
    for sample, handle in zip(samples, handles):
      self._run(sample, handle)
    return []

  def _id(self, sample: Sample) -> SequenceId:
    return SequenceId(sample.number, next(self._ids))

  def _run(self, sample: Sample, handle: Handle) -> None:
    """A sample has its row."""
    sample.handle, sample.row = handle, handle.row
    if not sample.decoding:
      sample.prefilled = handle.num_cached
      self.counts.cached_tokens += handle.num_cached
      sample.entry.num_cached = max(sample.entry.num_cached, handle.num_cached)
      if handle.last_logits is not None and not sample.tokens:
        sample.entry.logits = handle.last_logits
    self.queue.running[sample.row] = sample
    self.calls.changed[sample.row] = sample
    self.queue.remove(sample)

  def _begin(self, sample: Sample) -> bool:
    """Gives a waiting sample its row, from those behind it if need be; whether it could."""
    while True:
      try:
        self._place(sample)
        return True
      except (errors.OutOfPages, errors.OutOfRows) as error:
        self.refusal = error
        if self._overtakes(sample):
          self.preempt(self.queue.last())
        elif self.queue.running or not self._drop_swapped(sample):
          return False

  def _overtakes(self, sample: Sample) -> bool:
    """Whether some running sample gives its place to a waiting one."""
    if not self.queue.running:
      return False
    victim = self.queue.last()
    return victim.resting or victim.order[0] > sample.order[0]

  def _place(self, sample: Sample) -> None:
    """Rows and pages for what the sample already has, if there is room for its next call, too."""
    manager, origin = self.manager, sample.origin
    growth = self.growth(self.config.num_steps)
    longest = max(beam.length for beam in sample.beams)
    ahead = longest + self.config.num_steps * self.calls.width
    most = self.most_pages(len(sample.entry.prompt), len(sample.beams), ahead)
    if sample.swapped:
      self._check_room(most + growth)
      handles = [beam.handle for beam in sample.beams if beam.handle]
      manager.swap_in_many(handles)
      for beam, handle in zip(sample.beams, handles):
        beam.swapped = False
        self._run(beam, handle)
    elif origin is not None and origin.handle and sample.could_share(origin):
      self._check_room(self.pages(ahead) - self.pages(sample.length) + 2 + growth)
      handle = manager.clone(origin.handle, self._id(sample), num_tokens=sample.length - 1)
      sample.decoding = True
      self._run(sample, handle)
    else:
      text, later = np.array(sample.text, np.int32), most - self.pages(sample.length) + 1
      reserve = later + growth if self.queue.running else 0
      self._check_room(manager.pages_to_begin(text) + reserve)  # before it looks for room
      requests = [Request(self._id(sample), tokens=text)]
      requests += [Request(self._id(beam)) for beam in sample.beams[1:]]
      handles = manager.allocate_many(requests, reserve=reserve, wait=False)
      for beam, handle in zip(sample.beams, handles):
        self._run(beam, handle)

  def _check_room(self, needed: int) -> None:
    """Raises unless so many pages are to be had, or nobody runs who might give some back."""
    if self.queue.running and self.manager.num_free < needed:
      free = self.manager.num_free + self.manager.num_reclaimable
      if free < needed:
        raise errors.OutOfPages(needed=needed, free=free)

  def _drop_swapped(self, but: Sample) -> bool:
    """Turns some swapped sample into one to compute again, so that its pages come free."""
    swapped = [x for x in self.queue.waiting if x.swapped and x is not but]
    if swapped:
      self.forget(max(swapped, key=lambda sample: sample.order))
    return bool(swapped)

  # Preemption

  def preempt(self, sample: Sample) -> None:
    """Takes a sample's row and pages; all calls have been read."""
    swaps = all(beam.decoding for beam in sample.beams) and self.swaps(sample)
    if sample in self._unstored and not swaps:  # it may find some of its pages again
      self.manager.store_prefixes(self._beginning(sample))
    self.withdraw(sample)
    if not (swaps and self._swap_out(sample)):
      self.forget(sample)
    self.queue.add(sample.beams)

  def withdraw(self, sample: Sample) -> None:
    """Takes a sample off its row; it keeps its pages."""
    for beam in sample.beams:
      del self.queue.running[beam.row]
      self.calls.changed[beam.row] = None
      beam.row = -1
    if sample in self._unstored:
      self._unstored.remove(sample)

  def forget(self, sample: Sample) -> None:
    """A sample gives up what it holds: it is to be computed again, a search from its prompt on."""
    held = [beam for beam in sample.beams if beam.handle]
    self.manager.deallocate_many([beam.handle.request_id for beam in held if beam.handle])
    for beam in sample.beams:
      beam.let_go()
      if sample.searching:
        beam.tokens, beam.logprobs, beam.ended = [], [], False
    self.counts.recomputations += 1

  def swaps(self, sample: Sample) -> bool:
    """Whether preemption moves the sample's pages to the host, and does not compute them again."""
    choice = self.config.preemption
    if choice == "auto":
      swap = 2 * self.pages(sample.length - 1) * self.swap_seconds
      choice = "swap" if swap <= (sample.length - 1) * self.prompt_seconds else "recompute"
    return choice == "swap" and self.config.options.swapping

  def _swap_out(self, sample: Sample) -> bool:
    try:
      self.manager.swap_out_many([beam.handle for beam in sample.beams if beam.handle])
    except errors.OutOfHostPages:
      return False
    for beam in sample.beams:
      beam.swapped = True
    self.counts.swaps += 1
    return True

  # Commands

  def detach(self, sample: Sample) -> Body:
    """What a sample held; it is in no list any more. All calls have been read."""
    body = sample.body
    self.queue.remove(sample)
    if sample.row >= 0:
      del self.queue.running[sample.row]
      self.calls.changed[sample.row] = None
    self.ended = [each for each in self.ended if each is not sample]
    self._unstored = [each for each in self._unstored if each is not sample]
    sample.let_go()
    return body

  def attach(self, sample: Sample, body: Body | None, *, ends: bool) -> None:
    """A sample goes on with what another, or itself, held; without anything it comes to wait.

    Args:
      sample: In no list.
      body: What was held; None for nothing.
      ends: Whether the sample ends now, so that it keeps its pages in any state.
    """
    handle = None if body is None else body.handle
    if body is None or handle is None or not (ends or (body.row >= 0 and body.decoding)):
      self.give_back([body] if body else [])
      self.queue.add([] if ends else [sample])
      return
    sample.body = body
    if body.row >= 0:
      self.queue.running[body.row] = self.calls.changed[body.row] = sample
    if not ends and handle.num_tokens >= sample.length:
      self.manager.trim(handle, sample.length - 1)

  def give_back(self, bodies: Sequence[Body]) -> None:
    """Frees the rows and pages of bodies that nobody has any more."""
    self.manager.deallocate_many([body.handle.request_id for body in bodies if body.handle])

  # Calls

  def pieces(self) -> list[Piece]:
    """What the next call computes of texts that are not in the cache yet."""
    budget, pieces = self.config.prompt_sizes[-1], []
    reading = [x for x in self.queue.running.values() if not (x.decoding or x.completion)]
    for sample in sorted(reading, key=lambda sample: sample.order):
      if sample is sample.beams[0] and (budget or not sample.unread):
        pieces.append(Piece(sample, min(budget, sample.unread)))
        budget -= pieces[-1].num_tokens
    return pieces

  def started(self, pieces: list[Piece]) -> None:
    """These pieces are computed."""
    self._unstored += [piece.sample for piece in pieces if piece.sample.decoding]

  # Afterwards

  def end(self, sample: Sample) -> None:
    """What a sample with its completion holds is given back by `tidy`; it draws no more."""
    self.queue.remove(sample)
    if sample.row >= 0:
      self.calls.changed[sample.row] = None
    if sample.handle is not None:
      self.ended.append(sample)

  def tidy(self) -> None:
    """Gives back what ended samples hold, and lets those who wait start on what others have written,
    or are about to."""
    if self.config.options.prefix_cache:
      wanted = {sample.entry.beginning for sample in self.queue.waiting} - {None}
      each = [self._whole(sample) for sample in self.ended]
      each += [self._beginning(x) for x in self._unstored if x.entry.beginning in wanted]
      self._unstored = [
        x for x in self._unstored if not (x.completion or x.entry.beginning in wanted)
      ]
      if prefixes := [prefix for several in each for prefix in several]:
        self.manager.store_prefixes(prefixes, wait=False)
    if self.ended:
      held = [sample.handle.request_id for sample in self.ended if sample.handle]
      self.manager.deallocate_many(held, wait=False)
    for sample in self.ended:
      if sample.row >= 0:
        del self.queue.running[sample.row]
      sample.let_go()
    self.ended.clear()

  def _whole(self, sample: Sample) -> list[Prefix]:
    """What others may start on when a sample has ended: its prompt, and its text."""
    handle, entry = sample.handle, sample.entry
    failed = sample.completion is None or sample.completion.error is not None
    if handle is None or sample.row < 0 or not sample.decoding or failed:
      return []
    prefixes, text = [], np.array(sample.text[:-1], np.int32)
    if entry.logits is not None and handle.num_cached < len(entry.prompt) < sample.length:
      prefixes.append(Prefix(handle, text[: len(entry.prompt)], entry.logits))
      entry.logits = None
    if not sample.searching:
      prefixes.append(Prefix(handle, text))
    return prefixes

  def _beginning(self, sample: Sample) -> list[Prefix]:
    """The whole pages of a text that goes on; a page that is still written is not shared."""
    size = self.config.cache.page_size
    whole = (sample.length - 1) // size * size
    if whole and sample.handle and sample.row >= 0 and sample.completion is None:
      return [Prefix(sample.handle, sample.text[:whole])]
    return []
