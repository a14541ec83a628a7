"""Rows and pages for sequences: how sequences begin, grow, shrink and end."""

from collections.abc import Mapping, Sequence

import numpy as np

from paged_jax.host import errors, pressure
from paged_jax.host.config import Request, whole
from paged_jax.host.holds import Held, pages_of
from paged_jax.host.prefix import Match, encoded
from paged_jax.host.prefixes import NOTHING, Prefixes
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Clones, Handle, Sequences
from paged_jax.host.state import bucket, row_sizes


class Admission:
  """Bodies of allocate, extend, trim, slide and deallocate. Not thread-safe.

  Args:
    sequences: The live sequences.
    reclaim: Makes room by eviction.
    prefixes: Finds the stored prefixes that prompts start on.
  """

  def __init__(self, sequences: Sequences, reclaim: Reclaim, prefixes: Prefixes):
    self._sequences, self._reclaim, self._prefixes = sequences, reclaim, prefixes
    self._turn = sequences.turn
    self._kept, self._state, self._config = self._turn.kept, self._turn.state, self._turn.config
    self._ledger = self._state.ledger
    self.num_allocations = self.num_deallocations = 0

  # Beginning

  def allocate(
    self, manager: Clones, requests: Sequence[Request], reserve: int, spare: int
  ) -> list[Handle]:
    """Gives rows and pages to new sequences, all or none.

    # stored prefix   [a][b][c ]        the host holds these pages, for the index
    # adopt           [a][b][c ]        the row holds them too
    # extend          [a][b][c'][d]     the row takes c', a copy of c, and d, and gives up c
    """
    self.check(requests)
    prompts = [encoded(() if x.tokens is None else x.tokens) for x in requests]
    if len(requests) > len(self._sequences.rows):
      raise errors.OutOfRows(needed=len(requests), free=len(self._sequences.rows))
    self._reclaim.expire()
    matches = [self._prefixes.match(*each, touch=True) for each in zip(requests, prompts)]
    found = dict.fromkeys(each for match in matches for each in match.held)
    with self._reclaim.guarding(found):  # eviction must not take what the requests start on
      self._reclaim.tidy()  # lookups may have found expired prefixes
      if self._turn.level() == pressure.Level.CRITICAL:
        self._reclaim.reclaim(int(self._turn.options.high_watermark * self._config.num_pages))
      stay = not found or self._fits(requests, matches, reserve)
      if stay:
        self._reclaim.make_room(self.needed(requests, matches) + reserve, spare)
        self._kept.to_device([each for each in found if each.page is None])
    if not stay:  # there is no room beside the prefixes: the requests start from nothing
      matches = [NOTHING] * len(requests)
      self._reclaim.make_room(self.needed(requests, matches) + reserve, spare)
    handles = [self.begin(manager, *each) for each in zip(requests, matches)]
    rows = [self._sequences.place(handle) for handle in handles]
    self.adopt([(row, match.held, 0, match.length) for row, match in zip(rows, matches)])
    growth = {row: x.num_tokens - match.length for row, x, match in zip(rows, requests, matches)}
    if any(growth.values()):
      self._kept.apply("extend", self._by_row(growth))
    for prompt, match in zip(prompts, matches):
      if prompt and self._turn.options.prefix_cache:
        self._prefixes.count_lookup(prompt, match)
    return handles

  def check(self, requests: Sequence[Request]) -> None:
    """Raises if a request can never be granted, or its id is in use."""
    config = self._config
    seen = set()
    for request in requests:
      if request.request_id in self._sequences.by_id or request.request_id in seen:
        raise errors.DuplicateRequest(request.request_id)
      seen.add(request.request_id)
      for name in ("num_layers", "num_kv_heads", "head_dim"):
        wanted, got = getattr(config, name), getattr(request, name)
        if got is not None and got != wanted:
          raise errors.ShapeMismatch(name, wanted, got)
      if request.dtype is not None and np.dtype(request.dtype) != config.dtype:
        raise errors.ShapeMismatch("dtype", config.dtype, np.dtype(request.dtype))
      capacity = self._ledger.capacity
      limit = capacity if request.max_length is None else request.max_length
      if limit > capacity:
        raise errors.TooLong(request.request_id, limit, capacity)
      known = 0 if request.tokens is None else len(request.tokens)
      if max(request.num_tokens, known) > limit:
        raise errors.TooLong(request.request_id, max(request.num_tokens, known), limit)

  def needed(self, requests: Sequence[Request], matches: Sequence[Match]) -> int:
    """Pages that these requests take: restored, copied and new pages."""
    restored = {each for match in matches for each in match.held if each.page is None}
    grown = sum(
      self._ledger.pages_to_begin(match.length, request.num_tokens)
      for request, match in zip(requests, matches)
    )
    return grown + len(restored)

  def _fits(self, requests: Sequence[Request], matches: Sequence[Match], reserve: int = 0) -> bool:
    """Whether there is room for these requests and a reserve, with the matched pages guarded."""
    needed = self.needed(requests, matches) + reserve
    return needed <= self._state.num_free or needed <= self.available

  @property
  def available(self) -> int:
    """Pages that are free, or could be freed by eviction."""
    return self._state.num_free + self._reclaim.reclaimable

  def fits(self, request: Request) -> bool:
    """Whether `allocate` would succeed now."""
    try:
      self.check([request])
    except errors.CacheError:
      return False
    prompt = encoded(() if request.tokens is None else request.tokens)
    self._reclaim.expire()
    match = self._prefixes.match(request, prompt, touch=False)
    with self._reclaim.guarding(match.held):
      fits = self._fits([request], [match])
    return bool(self._sequences.rows) and (fits or self._fits([request], [NOTHING]))

  def begin(self, manager: Clones, request: Request, match: Match) -> Handle:
    """Begins a sequence in a free row, and records its tokens."""
    handle = self._sequences.begin(
      manager, request.request_id, request.max_length, request.namespace
    )
    handle.num_cached, handle.last_logits = match.length, match.last_logits
    self._sequences.know(
      self._sequences.place(handle), () if request.tokens is None else request.tokens
    )
    self.num_allocations += 1
    return handle

  def adopt(self, starts: Sequence[tuple[int, list[Held], int, int]]) -> None:
    """Starts empty rows on held pages; each of `starts` is (row, held pages, start, length).

    # held   [a][b][c ]     refcount 1, holds 1
    # row    [a][b][c ]     refcount 2, holds 1
    """
    config = self._config
    starts = [each for each in starts if each[3]]
    if not starts:
      return
    b = bucket(len(starts), row_sizes(config.num_rows))
    for i in range(0, len(starts), b):
      rows = np.full(b, config.num_rows, np.int32)
      pages = np.full((b, config.pages_per_row), config.num_pages, np.int32)
      begins, lengths = np.zeros((2, b), np.int32)
      for n, (row, held, begin, length) in enumerate(starts[i : i + b]):
        rows[n], begins[n], lengths[n] = row, begin, length
        pages[n, : len(held)] = pages_of(held)
      whole_pages = -(-lengths // config.page_size) * config.page_size
      self._kept.apply(
        "adopt", rows, pages, lengths if config.copy_on_write else whole_pages, begins
      )

  # Growing and shrinking

  def extend(self, num_tokens: Mapping[Handle, int]) -> None:
    """Makes room in rows, all or none.

    # row before   [a][b ]           others hold b too
    # row after    [a][b'][c]        the row takes b', a copy of b, and c, and gives up b
    """
    growth: dict[int, int] = {}
    for handle, count in num_tokens.items():
      row = self._sequences.running(handle)
      growth[row] = whole("num_tokens", count, 0)
      wanted = int(self._ledger.lengths[row]) + growth[row]
      if wanted > handle.max_length:
        raise errors.TooLong(handle.request_id, wanted, handle.max_length)
    if not any(growth.values()):
      return
    counts = self._by_row(growth)
    if not self._config.copy_on_write and self._ledger.shares_tail(counts):
      raise errors.Disabled("copy-on-write")
    self._reclaim.make_room(int(self._ledger.pages_needed(counts).sum()))
    self._kept.apply("extend", counts)

  def _by_row(self, growth: Mapping[int, int]) -> np.ndarray:
    """Tokens i32[S] for each row, from those of some rows."""
    num_tokens = np.zeros(self._config.num_rows, np.int32)
    num_tokens[list(growth)] = list(growth.values())
    return num_tokens

  def cut(self, verb: str, handle: Handle, at: int) -> None:
    """Trims a row to `at` tokens, or slides it to start at `at`; releases whole pages outside.

    # row         [a][b][c][d]
    # trim  at    [a][b]           c and d lose this holder
    # slide at          [c][d]     a and b lose this holder
    """
    row = self._sequences.running(handle)
    begin, end = self._sequences.bounds(row)
    if not (begin if verb == "trim" and at else 0) <= at <= end:
      raise self._sequences.unmapped(handle, at)
    values = (self._ledger.lengths if verb == "trim" else self._ledger.groups[0].starts).copy()
    values[row] = at
    before = self._sequences.mapped(row)
    self._kept.apply(verb, values)
    if verb == "trim":
      self._sequences.forget(row, at)
      del handle.writers[at:]
    self._kept.scrub(sorted(set(before) - set(self._sequences.mapped(row))))

  # Leaving

  def deallocate(self, request_ids: Sequence) -> None:
    """Ends sequences, all or none.

    # row           [a][b]     both lose this holder; b stays if the prefix index has it
    # swapped out   [a] img    both lose this user; an image that nothing uses is forgotten
    """
    handles = [self._sequences.get(request_id) for request_id in request_ids]
    if len(set(request_ids)) != len(request_ids):
      raise ValueError(f"request_ids must be distinct, got {list(request_ids)}")
    held = [self._sequences.stats(handle) for handle in handles]
    self.free([each.place for each in handles if each.place is not None])
    for handle, had in zip(handles, held):
      del self._sequences.by_id[handle.request_id]
      for each in handle.held:
        self._kept.swap(each, -1)
      self._kept.let_go(handle.held)
      num_pages = had.num_pages + had.num_host_pages
      self._turn.event("removed", handle.request_id, num_pages, had.num_tokens)
    self.num_deallocations += len(handles)

  def free(self, rows: list[int]) -> None:
    """Empties rows, and makes them free."""
    marked = np.zeros(self._config.num_rows, bool)
    marked[rows] = True
    if not self._state.waits:  # otherwise a program may have filled a row that looks empty
      marked &= self._ledger.lengths > 0
    if marked.any():
      pages = self._ledger.groups[0].block_tables[marked]
      self._kept.apply("free", marked)
      self._kept.scrub(pages[pages < self._config.num_pages].tolist())
    for row in rows:
      self._sequences.vacate(row)
