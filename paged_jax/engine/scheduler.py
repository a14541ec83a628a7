"""Who runs: rows and pages for those first in line, taken from those behind them if need be.

A request waits because no row is free, too few pages are available, the prompts on rows fill the next
call, or another sample is computing what it could share (see `queue`).

    # admit     free pages  ──▶  a row's        the first in line begins
    # preempt   a row's     ──▶  host memory    the last one gives way: `swapped`
    #                       ──▶  free pages     or it is computed again later: `forget`
    # tidy      a row's     ──▶  prefix cache, free pages      samples that have ended

Nothing here looks at the device.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from paged_jax.engine.calls import Calls, Piece
from paged_jax.engine.config import Counts, EngineConfig
from paged_jax.engine.device.records import most_prompts
from paged_jax.engine.queue import Queue
from paged_jax.engine.requests import Body, Sample, SequenceId, State
from paged_jax.engine.room import Room, given, vector, within
from paged_jax.host import Handle, Manager, Prefix, errors
from paged_jax.host import Request as Allocation

_CALLS_AHEAD = 4  # prefixes are evicted for so many at once: before, all reports must be read


class Scheduler:
  """Admission, preemption, and what samples leave behind."""

  def __init__(
    self,
    manager: Manager,
    queue: Queue,
    room: Room,
    calls: Calls,
    config: EngineConfig,
    counts: Counts,
  ):
    self.manager, self.queue, self.room, self.calls = manager, queue, room, calls
    self.config, self.counts = config, counts
    self.ended: dict[Sample, None] = {}  # they have their completion, and still hold something
    self.swap_seconds = 0.0  # per page and way
    self.prompt_seconds = 0.0  # per token
    self._unstored: dict[Sample, None] = {}  # their prompt is computed, not in the prefix index
    self._begun: dict[Sample, None] = {}  # with windows: their prompt is computed by the last call
    # The last sample refused, and the pages available then.
    self._refused: tuple[Sample | None, np.ndarray] = (None, np.zeros(len(config.caches), np.int64))
    self.refusal: errors.CacheError | None = None  # what the manager said to the last one refused
    self._ids = itertools.count()

  # Admission

  @property
  def only_ended(self) -> bool:
    """Whether there are samples that have ended, and none on a row that goes on."""
    running = self.queue.running.values()
    return bool(self.ended) and not any(sample.draws or sample.unread for sample in running)

  def _look(self) -> set:
    """Closes the lines of samples that could share what is just computed; returns the first pages of
    samples on rows that were cached: samples that begin alike need not wait for each other."""
    if not self.config.options.prefix_cache:
      self.queue.waiting.close(frozenset())
      return set()
    size, rows = self.config.page_size, self.queue.running.values()
    cached = {x.request.beginning for x in rows if x.handle and x.handle.num_cached >= size}
    being_read = {page for x in rows if x.unread and (page := x.request.beginning)}
    self.queue.waiting.close(being_read - cached)
    return cached

  def may_admit(self) -> bool:
    """Whether admission is worth trying: some waiting sample could start in the next call, and more
    room is there than at its last refusal."""
    if not self.queue.waiting.num_ready:
      return False
    self._look()
    first = self.queue.waiting.first()
    if first is None:
      return False
    if self._overtakes(first):
      return True
    if sum(x.unread for x in self.queue.running.values()) >= self.config.prompt_sizes[-1]:
      return False
    vacant = self.manager.num_free_rows + sum(sample.row >= 0 for sample in self.ended)
    sample, available = self._refused
    return vacant >= len(first.beams) and (
      first is not sample or not within(self._available(), available)
    )

  def _available(self) -> np.ndarray:
    """Pages available to a new sample once all reports are read, and ended samples give theirs back."""
    there = self.room.available - self.room.needed(0)
    for sample in self.ended:
      if sample.row >= 0:
        there = there + self.room.pages(sample.length)
    return there

  def admit(self) -> bool:
    """Rows and pages to those first in line, as long as there is room.

    Returns:
      False: All reports must be read before the first of those left is looked at, since it takes
      others' room, moves, or starts on another one's pages.
    """
    batch: list[Sample] = []  # plain ones, to be allocated together
    cached, (needed, left) = self._look(), self._left()
    shares, waiting = self.config.options.prefix_cache, self.queue.waiting
    self._refused = (None, self._refused[1])
    while (sample := waiting.first()) is not None:
      beginning = sample.request.beginning
      if beginning not in cached | {None} and beginning in {x.request.beginning for x in batch}:
        batch = self._allocate(batch, needed)  # one computes, or has, what this one could share
        cached = self._look()
        continue
      ahead = self.room.pages(sample.length + self.config.num_steps * self.config.width) + 1
      plain = not (sample.handle or sample.origin or sample.searching)
      if plain and len(batch) < self.manager.num_free_rows and within(ahead, left):
        batch.append(sample)
        waiting.remove(sample)
        # part of a page may have to be copied
        left = left - self.room.pages(sample.length) - shares
        continue
      batch = self._allocate(batch, needed)
      overtakes = self._overtakes(sample)
      if self.manager.num_free_rows < len(sample.beams) and not overtakes:
        free = self.manager.num_free_rows
        self.refusal = errors.OutOfRows(needed=len(sample.beams), free=free)
        break
      if len(self.calls) and (overtakes or not plain):
        return False
      if not self._begin(sample, needed):
        if self.manager.num_free_rows >= len(sample.beams):  # so pages were missing
          self._refused = (sample, self._available())
        break
      cached, (needed, left) = self._look(), self._left()
    self._allocate(batch, needed)
    self.counts.peak_running = max(self.counts.peak_running, len(self.queue.running))
    return True

  def _left(self) -> tuple[np.ndarray, np.ndarray]:
    """Pages that the next call needs, and available ones that it leaves."""
    needed = self.room.needed(self.config.num_steps)
    return needed, self.room.available - needed

  def _allocate(self, samples: list[Sample], needed: np.ndarray) -> list[Sample]:
    """Rows, and pages for the whole text, to samples for which there is room beside what the next call
    needs; none are left. With windows pages come with the pieces of the text, see `prepare`."""
    if not samples:
      return []
    texts = [np.array(sample.text, np.int32) for sample in samples]
    requests = [self._request(x, text) for x, text in zip(samples, texts)]
    spare, pages = np.zeros_like(needed), self.room.pages
    taken = np.sum([pages(len(text)) for text in texts], axis=0)
    if not within(needed + taken + len(texts), self.room.free):
      ahead = _CALLS_AHEAD * self.config.num_steps
      spare = self.room.needed(ahead) - needed + len(samples) * pages(ahead * self.config.width)
    reserve = needed
    if self.config.windowed:  # part of a page may have to be copied
      reserve = needed + taken + len(texts) * self.config.options.prefix_cache
    handles = self.manager.allocate_many(
      requests, reserve=given(reserve), spare=given(np.maximum(spare, 0)), wait=False
    )
    for sample, handle in zip(samples, handles):
      self._run(sample, handle)
    return []

  def _request(self, sample: Sample, text: np.ndarray) -> Allocation:
    """What the manager is asked for."""
    return Allocation(self._id(sample), tokens=text, only_cached=self.config.windowed)

  def _id(self, sample: Sample) -> SequenceId:
    return SequenceId(sample.number, next(self._ids))

  def _run(self, sample: Sample, handle: Handle, *, decoding: bool = False) -> None:
    """A sample has its row; `decoding` if its text is in the cache."""
    if not decoding:
      request = sample.request
      self.counts.cached_tokens += handle.num_cached
      request.num_cached = max(request.num_cached, handle.num_cached)
      if handle.last_logits is not None and not sample.tokens:
        request.logits = handle.last_logits
    self.queue.waiting.remove(sample)
    sample.begin(Body(handle, handle.row, decoding, handle.num_cached))
    self.queue.running[sample.row] = self.calls.changed[sample.row] = sample

  def _begin(self, sample: Sample, needed: np.ndarray) -> bool:
    """Gives a waiting sample its row, from those behind it if need be; whether it could.

    `needed` are the pages that the next call needs without it.
    """
    while True:
      try:
        self._place(sample, needed)
        return True
      except (errors.OutOfPages, errors.OutOfRows) as error:
        self.refusal = error
        if self._overtakes(sample):
          self.preempt(self.queue.last())
          needed = self.room.needed(self.config.num_steps)
        elif self.queue.running or not self._drop_swapped(sample):
          return False

  def _overtakes(self, sample: Sample) -> bool:
    """Whether some running sample gives its place to a waiting one."""
    if not self.queue.running:
      return False
    victim = self.queue.last()
    return victim.resting or victim.order[0] > sample.order[0]

  def _place(self, sample: Sample, needed: np.ndarray) -> None:
    """Rows and pages for what the sample already has, if there is room for the next call, too."""
    manager, origin, pages = self.manager, sample.origin, self.room.pages
    longest = max(beam.length for beam in sample.beams)
    ahead = longest + self.config.num_steps * self.config.width
    most = self.room.most_pages(len(sample.request.prompt), len(sample.beams), ahead)
    if sample.swapped:
      self.room.check(most + needed)
      handles = [beam.handle for beam in sample.beams if beam.handle]
      manager.swap_in_many(handles)
      for beam, handle in zip(sample.beams, handles):
        self._run(beam, handle, decoding=True)
    elif origin is not None and self._could_share(sample, origin):
      # origin   [prompt . . | a b c]      keeps its pages
      # sample   [prompt . . | a b .       the same ones; the first write copies the last page
      self.room.check(pages(ahead) - pages(sample.length) + 2 + needed)
      assert origin.handle is not None
      handle = manager.clone(origin.handle, self._id(sample), num_tokens=sample.length - 1)
      self._run(sample, handle, decoding=True)
    else:
      text, later = np.array(sample.text, np.int32), most - pages(sample.length) + 1
      begin = vector(manager.pages_to_begin(text, step=self.room.step))
      reserve = later + needed if self.queue.running else np.zeros_like(needed)
      self.room.check(begin + reserve)  # before it looks for room
      if self.config.windowed:
        reserve = reserve + begin
      requests = [self._request(sample, text)]
      requests += [Allocation(self._id(beam)) for beam in sample.beams[1:]]
      handles = manager.allocate_many(requests, reserve=given(reserve), wait=False)
      for beam, handle in zip(sample.beams, handles):
        self._run(beam, handle)

  def _could_share(self, sample: Sample, origin: Sample) -> bool:
    """Whether all of a sample's text except the last token is on the pages of the row of `origin`, which
    has the same prompt."""
    known = sample.tokens[:-1]
    on_row = origin.row >= 0 and origin.decoding and origin.length >= sample.length
    if not on_row or origin.handle is None or origin.tokens[: len(known)] != known:
      return False
    return origin.handle.begins(sample.length - 1)

  def _drop_swapped(self, sample: Sample) -> bool:
    """Turns another swapped sample into one to compute again, so that its pages come free; whether
    there is one."""
    swapped = [x for x in self.queue.waiting if x.swapped and x is not sample]
    if swapped:
      last = max(swapped, key=lambda sample: sample.order)
      self.queue.waiting.remove(last)
      self.forget(last)
      self.queue.waiting.add(last)
    return bool(swapped)

  # Preemption

  def make_room(self, num_steps: int) -> tuple[Sample, errors.OutOfPages] | None:
    """Frees the pages that the next call needs: evicts prefixes, then preempts.

    All reports must have been read.

    Returns:
      The only sample that runs, and why, if it cannot go on: what is missing is pinned, or held by
      others than the engine.
    """
    while not within(needed := self.room.needed(num_steps), self.room.free):
      self.manager.gc(given(self.room.needed(_CALLS_AHEAD * num_steps)))
      if within(needed, self.room.free):
        break
      victim = self.queue.last()
      if len(self.queue.running) > len(victim.beams):
        self.preempt(victim)
      elif not self.manager.clear_prefixes(pinned=False):  # one may share its last page
        return victim, self.room.lack(needed)
    return None

  def preempt(self, sample: Sample) -> None:
    """Takes a sample's row and pages; all reports have been read.

    # row       [prompt | a b c]            gives way
    # swap      host [prompt | a b c]       begins again where it was
    # forget    prefix cache [prompt ..]    begins again with what is left of its whole pages
    """
    swapped = all(beam.decoding for beam in sample.beams) and self.swaps(sample)
    swapped = swapped and self._swap_out(sample)
    if sample in self._unstored and not swapped:  # it may find some of its pages again
      self.manager.store_prefixes(self._beginning(sample))
    self._unstored.pop(sample, None)
    for beam in sample.beams:
      self._vacate(beam)
      if swapped:
        beam.leave(swapped=True)
    if not swapped:
      self.forget(sample)
    self.queue.waiting.add(sample.beams[0])

  def _vacate(self, sample: Sample) -> None:
    """Nobody is in a sample's row any more."""
    del self.queue.running[sample.row]
    self.calls.changed[sample.row] = None

  def forget(self, sample: Sample) -> None:
    """A sample gives up what it holds: it is to be computed again, a search from its prompt on."""
    self.give_back([beam.leave() for beam in sample.beams])
    for beam in sample.beams:
      if sample.searching:
        beam.search([], [])
    self.counts.recomputations += 1

  def swaps(self, sample: Sample) -> bool:
    """Whether preemption moves the sample's pages to the host, and does not compute them again."""
    choice = self.config.preemption
    if choice == "auto":
      swap = 2 * int(self.room.pages(sample.length - 1).sum()) * self.swap_seconds
      choice = "swap" if swap <= (sample.length - 1) * self.prompt_seconds else "recompute"
    return choice == "swap" and self.config.options.swapping

  def _swap_out(self, sample: Sample) -> bool:
    try:
      self.manager.swap_out_many([beam.handle for beam in sample.beams if beam.handle])
    except errors.OutOfHostPages:
      return False
    self.counts.swaps += 1
    return True

  # Commands

  def detach(self, sample: Sample) -> Body:
    """What a sample held; it is in no list any more. All reports have been read."""
    self.queue.waiting.remove(sample)
    if sample.row >= 0:
      self._vacate(sample)
    self.ended.pop(sample, None)
    self._unstored.pop(sample, None)
    return sample.leave()

  def attach(self, sample: Sample, body: Body | None, *, ends: bool) -> Body | None:
    """A sample goes on with what another, or itself, held; without anything it comes to wait.

    Args:
      sample: In no list.
      body: What was held; None for nothing.
      ends: Whether the sample ends now, so that it keeps its pages in any state.

    Returns:
      What it has no use for, to be given back.
    """
    handle = None if body is None else body.handle
    usable = body is not None and (ends or (body.row >= 0 and body.decoding))
    if usable and handle is not None and not ends and handle.num_tokens >= sample.length:
      usable = handle.begins(sample.length - 1)
    if body is None or handle is None or not usable:
      if not ends and sample is sample.beams[0]:
        self.queue.waiting.add(sample)
      return body
    sample.begin(body)
    if body.row >= 0:
      self.queue.running[body.row] = self.calls.changed[body.row] = sample
    if not ends and handle.num_tokens >= sample.length:
      self.manager.trim(handle, sample.length - 1)
    return None

  def give_back(self, bodies: Sequence[Body | None], *, wait: bool = True) -> None:
    """Frees the rows and pages of bodies that nobody has any more."""
    held = [body.handle.request_id for body in bodies if body and body.handle]
    if held:
      self.manager.deallocate_many(held, wait=wait)

  # Calls

  def pieces(self) -> list[Piece]:
    """What the next call computes of texts that are not in the cache yet."""
    budget, pieces = self.config.prompt_sizes[-1], []
    places = most_prompts(budget)
    reading = [x for x in self.queue.running.values() if x.state is State.READING]
    for sample in sorted(reading, key=lambda sample: sample.order):
      if sample is sample.beams[0] and ((budget and places) or not sample.unread):
        pieces.append(Piece(sample, min(budget, sample.unread)))
        budget -= pieces[-1].num_tokens
        places -= pieces[-1].num_tokens > 0
    return pieces

  def prepare(self, pieces: list[Piece]) -> None:
    """Before the call with these pieces: with windows, rows get pages for them, and give up others.

    The prompts that the last call has completed are stored: their pages are known now, and this call
    lets windows pass some of them.
    """
    if not self.config.windowed:
      return
    if self.config.options.prefix_cache:
      prefixes = [x for sample in self._begun if sample.decoding for x in self._beginning(sample)]
      if prefixes:
        self.manager.store_prefixes(prefixes, wait=False)
    self._begun.clear()
    growth = {x.sample.handle: x.num_tokens for x in pieces if x.num_tokens and x.sample.handle}
    if growth:
      self.manager.extend_many(growth, wait=False)

  def started(self, pieces: list[Piece]) -> None:
    """These pieces are computed."""
    begun = {piece.sample: None for piece in pieces if piece.sample.decoding}
    if self.config.windowed:
      self._begun = begun
    else:
      self._unstored |= begun

  # Afterwards

  def end(self, sample: Sample) -> None:
    """What a sample with its completion holds is given back by `tidy`; it draws no more."""
    self.queue.waiting.remove(sample)
    if sample.row >= 0:
      self.calls.changed[sample.row] = None
    if sample.handle is not None:
      self.ended[sample] = None

  def tidy(self) -> None:
    """Gives back what ended samples hold, and lets those who wait start on what others have written,
    or are about to.

    # ended    [prompt | a b c]   its row ends; the prefix cache keeps pages of prompt and text
    # going    [prompt | a b      keeps its row; samples that wait may share its whole pages
    """
    if self.config.options.prefix_cache:
      each = [self._whole(sample) for sample in self.ended]
      wanted = self.queue.waiting.begin_with
      stored = [x for x in self._unstored if x.completion or wanted(x.request.beginning)]
      for sample in stored:
        del self._unstored[sample]
        each.append(self._beginning(sample))
      if prefixes := [prefix for several in each for prefix in several]:
        self.manager.store_prefixes(prefixes, wait=False)
    for sample in self.ended:
      if sample.row >= 0:
        del self.queue.running[sample.row]
    self.give_back([sample.leave() for sample in self.ended], wait=False)
    self.ended.clear()

  def _whole(self, sample: Sample) -> list[Prefix]:
    """What others may start on when a sample has ended: its prompt, and its text."""
    handle, request = sample.handle, sample.request
    failed = sample.completion is None or sample.completion.error is not None
    if handle is None or sample.row < 0 or not sample.decoding or failed:
      return []
    prefixes, text = [], np.array(sample.text[:-1], np.int32)
    if request.logits is not None and handle.num_cached < len(request.prompt) < sample.length:
      prefixes.append(Prefix(handle, text[: len(request.prompt)], request.logits))
      request.logits = None
    if not sample.searching:
      prefixes.append(Prefix(handle, text))
    return prefixes

  def _beginning(self, sample: Sample) -> list[Prefix]:
    """The whole pages of a text that goes on; a page that is still written is not shared."""
    size = self.config.page_size
    whole = (sample.length - 1) // size * size
    if whole and sample.handle and sample.row >= 0 and sample.completion is None:
      return [Prefix(sample.handle, sample.part(0, whole))]
    return []
