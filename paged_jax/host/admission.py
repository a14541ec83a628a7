"""Rows and pages for sequences: how sequences begin, grow, shrink and end."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from paged_jax import groups
from paged_jax.host import errors
from paged_jax.host.config import Request, whole
from paged_jax.host.holds import Held, latest_start, pages_of
from paged_jax.host.pools import Pools, Start
from paged_jax.host.prefix import encoded
from paged_jax.host.prefixes import Prefixes
from paged_jax.host.sequences import Clones, Handle, Sequences
from paged_jax.host.state import bucket, row_sizes


class Admission:
  """Bodies of allocate, extend, trim, slide and deallocate. Not thread-safe.

  Args:
    sequences: The live sequences.
    pools: Make room by eviction.
    prefixes: Finds the stored prefixes that prompts start on.
  """

  def __init__(self, sequences: Sequences, pools: Pools, prefixes: Prefixes):
    self._sequences, self._pools, self._prefixes = sequences, pools, prefixes
    self._turn, self._configs = sequences.turn, sequences.configs
    self._state = self._turn.state
    self._ledger, self._nothing = self._state.ledger, pools.nothing
    self.num_allocations = self.num_deallocations = 0

  # Beginning

  def allocate(
    self,
    manager: Clones,
    requests: Sequence[Request],
    reserve: Sequence[int],
    spare: Sequence[int],
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
    self._pools.expire()
    matches = [self._prefixes.match(*each, touch=True) for each in zip(requests, prompts)]
    found = [dict.fromkeys(itertools.chain(*own)) for own in zip(*(x.held for x in matches))]
    with self._pools.guarding(found):  # eviction must not take what the requests start on
      self._pools.tidy()  # lookups may have found expired prefixes
      self._relieve()
      stay = not any(found) or self._fits(requests, matches, reserve)
      if stay:
        self._pools.make_room(_sums(self.needed(requests, matches), reserve), spare)
        self._pools.to_device(found)
    if not stay:  # there is no room beside the prefixes: the requests start from nothing
      matches = [self._nothing] * len(requests)
      self._pools.make_room(_sums(self.needed(requests, matches), reserve), spare)
    handles = [self.begin(manager, *each) for each in zip(requests, matches)]
    rows = [self._sequences.place(handle) for handle in handles]
    self.adopt([(row, x.held, x.starts, x.length) for row, x in zip(rows, matches)])
    growth = {row: _growth(x, match) for row, x, match in zip(rows, requests, matches)}
    if any(growth.values()):
      self._turn.apply("extend", self._by_row(growth))
    for prompt, match in zip(prompts, matches):
      if prompt and self._turn.options.prefix_cache:
        self._prefixes.count_lookup(prompt, match)
    return handles

  def _relieve(self) -> None:
    """Evicts from pools without a free page, up to the high watermark."""
    for book, config, reclaim in zip(self._ledger.groups, self._configs, self._pools.reclaims):
      if not book.num_free:
        reclaim.reclaim(int(self._turn.options.high_watermark * config.num_pages))

  def check(self, requests: Sequence[Request]) -> None:
    """Raises if a request can never be granted, or its id is in use."""
    config = self._configs[0]
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

  def needed(self, requests: Sequence[Request], matches: Sequence[Start]) -> list[int]:
    """Pages of each group that these requests take: restored, copied and new pages."""
    ends = [(x.length, x.length + _growth(request, x)) for request, x in zip(requests, matches)]
    needed = []
    for group in range(len(self._configs)):
      restored = {each for match in matches for each in match.held[group] if each.page is None}
      grown = sum(self._ledger.pages_to_begin(*each, group) for each in ends)
      needed.append(grown + len(restored))
    return needed

  def _fits(
    self, requests: Sequence[Request], matches: Sequence[Start], reserve: Sequence[int]
  ) -> bool:
    """Whether there is room for these requests and a reserve, with the matched pages guarded."""
    return self._pools.fits(_sums(self.needed(requests, matches), reserve))

  def fits(self, request: Request) -> bool:
    """Whether `allocate` would succeed now."""
    try:
      self.check([request])
    except errors.CacheError:
      return False
    prompt = encoded(() if request.tokens is None else request.tokens)
    self._pools.expire()
    match, nothing = self._prefixes.match(request, prompt, touch=False), self._nothing
    reserve = [0] * len(self._configs)
    with self._pools.guarding(match.held):
      fits = self._fits([request], [match], reserve)
    return bool(self._sequences.rows) and (fits or self._fits([request], [nothing], reserve))

  def begin(self, manager: Clones, request: Request, match: Start) -> Handle:
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

  def adopt(
    self, starts: Sequence[tuple[int, Sequence[Sequence[Held]], Sequence[int], int]]
  ) -> None:
    """Starts empty rows on held pages; each of `starts` is a row, held pages and first live token of
    each group, and a length.

    # held   [a][b][c ]     refcount 1, holds 1
    # row    [a][b][c ]     refcount 2, holds 1
    """
    state = self._state
    starts = [each for each in starts if each[3]]
    if not starts:
      return
    b = bucket(len(starts), row_sizes(state.num_rows))
    for i in range(0, len(starts), b):
      rows, lengths = np.full(b, state.num_rows, np.int32), np.zeros(b, np.int32)
      pages = [np.full((b, x.pages_per_row), x.num_pages, np.int32) for x in self._configs]
      begins = [np.zeros(b, np.int32) for _ in self._configs]
      for n, (row, held, first, length) in enumerate(starts[i : i + b]):
        rows[n], lengths[n] = row, length
        for group, own in enumerate(held):
          begins[group][n] = first[group]
          pages[group][n, : len(own)] = pages_of(own)
      if not state.copy_on_write:
        lengths = -(-lengths // state.page_size) * state.page_size
      self._turn.apply("adopt", rows, state.like(pages), lengths, state.like(begins))

  # Growing and shrinking

  def extend(
    self, num_tokens: Mapping[Handle, int], reserve: Sequence[int], spare: Sequence[int]
  ) -> None:
    """Makes room in rows, all or none.

    # row before   [a][b ]           others hold b too
    # row after    [a][b'][c]        the row takes b', a copy of b, and c, and gives up b
    # window       [-][b'][c]        and a, if no later token sees it
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
    if not self._state.copy_on_write and self._ledger.shares_tail(counts):
      raise errors.Disabled("copy-on-write")
    needed = groups.each(self._ledger.pages_needed(counts))
    passed = self._ledger.pages_passed(counts)  # these come free first
    needed = [int(own.sum()) - freed for own, freed in zip(needed, passed)]
    self._pools.make_room(_sums(needed, reserve), spare)
    before = self._to_scrub(growth)
    self._turn.apply("extend", counts)
    self._scrub(before)

  def _by_row(self, growth: Mapping[int, int]) -> np.ndarray:
    """Tokens i32[S] for each row, from those of some rows."""
    num_tokens = np.zeros(self._state.num_rows, np.int32)
    num_tokens[list(growth)] = list(growth.values())
    return num_tokens

  def cut(self, verb: str, handle: Handle, at: int) -> None:
    """Trims a row to `at` tokens, or slides it to start at `at`; releases whole pages outside.

    # row         [a][b][c][d]
    # trim  at    [a][b]           c and d lose this holder
    # slide at          [c][d]     a and b lose this holder
    """
    row, sequences = self._sequences.running(handle), self._sequences
    if not (sequences.begins(row, at) if verb == "trim" else self._slides(row, at)):
      raise sequences.unmapped(handle, at)
    values = self._ledger.lengths.copy() if verb == "trim" else np.zeros_like(self._ledger.lengths)
    values[row] = at
    before = self._to_scrub([row])
    self._turn.apply(verb, values)
    self._scrub(before)
    if verb == "trim":
      sequences.forget(row, at)
      for writers in handle.writers:
        del writers[at:]

  def _to_scrub(self, rows: Iterable[int]) -> list[np.ndarray]:
    """In scrub mode, table entries of each group that rows may give up, for `_scrub` afterwards."""
    scrub = self._turn.options.scrub
    return [book.block_tables[list(rows)] for book in self._ledger.groups] if scrub else []

  def _scrub(self, entries: Sequence[np.ndarray]) -> None:
    """Clears those of these pages of each group that are free now."""
    for kept, pages in zip(self._pools.kept, entries):
      kept.scrub(np.unique(pages[pages < kept.config.num_pages]).tolist())

  def _slides(self, row: int, start: int) -> bool:
    """Whether a row may forget its tokens before `start`."""
    length = int(self._ledger.lengths[row])
    latest = (latest_start(length, x.window, otherwise=length) for x in self._configs)
    return 0 <= start <= min(latest)

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
      self._pools.end_swap(handle.held)
      num_pages = had.num_pages + had.num_host_pages
      self._turn.event("removed", handle.request_id, num_pages, had.num_tokens)
    self.num_deallocations += len(handles)

  def free(self, rows: list[int]) -> None:
    """Empties rows, and makes them free."""
    marked = np.zeros(self._state.num_rows, bool)
    marked[rows] = True
    if not self._state.waits:  # otherwise a program may have filled a row that looks empty
      marked &= self._ledger.lengths > 0
    if marked.any():
      pages = [book.block_tables[marked] for book in self._ledger.groups]
      self._turn.apply("free", marked)
      for kept, own in zip(self._pools.kept, pages):
        kept.scrub(own[own < kept.config.num_pages].tolist())
    for row in rows:
      self._sequences.vacate(row)


def _sums(needed: Sequence[int], reserve: Sequence[int]) -> list[int]:
  """Pages of each group, the reserve included."""
  return [own + more for own, more in zip(needed, reserve)]


def _growth(request: Request, match: Start) -> int:
  """Tokens that a request asks room for behind the cached ones."""
  return 0 if request.only_cached else request.num_tokens - match.length
