"""The prefix cache at the counter: lookups, and sequences whose pages are kept for others."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from paged_jax.host.config import Request
from paged_jax.host.holds import Held
from paged_jax.host.prefix import TOKEN_BYTES, Match, PrefixIndex, encoded
from paged_jax.host.reclaim import Reclaim
from paged_jax.host.sequences import Handle, Sequences

NOTHING = Match(0, None, [])


class Prefix(NamedTuple):
  """What `store_prefixes` keeps of a sequence; see `Manager.store_prefix`."""

  handle: Handle
  tokens: Sequence[int] | np.ndarray | None = None
  last_logits: Any = None
  ttl: float | None = None
  pinned: bool = False


class PrefixStats(NamedTuple):
  """The prefix cache's numbers. A hit is a lookup that found at least one token."""

  queries: int
  hits: int
  misses: int
  tokens_queried: int
  tokens_hit: int
  evictions: int  # pages that left the device
  entries: int
  cached_tokens: int

  @property
  def hit_rate(self) -> float:
    """Hits per query."""
    return self.hits / self.queries if self.queries else 0.0


class Prefixes:
  """Lookups and stores. Not thread-safe: callers are inside a `turn.change` or its lock.

  Args:
    sequences: Whose pages are stored.
    reclaim: What makes room among the entries.
    index: The tree.
  """

  def __init__(self, sequences: Sequences, reclaim: Reclaim, index: PrefixIndex):
    self.index = index
    self._sequences, self._reclaim, self._turn = sequences, reclaim, sequences.turn
    self._kept, self._config = self._turn.kept, self._turn.config
    self._lookups = dict.fromkeys(("queries", "hits", "misses", "tokens_queried", "tokens_hit"), 0)
    self._forgotten = 0  # evictions before the counters were reset

  # Lookups

  def find(self, namespace: Hashable, tokens: bytes) -> Match:
    """The longest stored prefix; counts as a lookup and as a use."""
    match = self.index.find(namespace, tokens)
    self.count_lookup(tokens, match)
    return match

  def match(self, request: Request, prompt: bytes, *, touch: bool) -> Match:
    """The cached beginning of a request, cut to what it can use."""
    if not (prompt and self._turn.options.prefix_cache):
      return NOTHING
    look_up: Callable[[Hashable, bytes], Match] = self.index.find if touch else self.index.peek
    match, size = look_up(request.namespace, prompt), len(prompt) // TOKEN_BYTES
    length = min(match.length, request.num_tokens)
    if match.last_logits is None:
      length = min(length, size - 1)  # at least the last token is computed
    if not self._config.copy_on_write:
      length -= length % self._config.page_size
    held = match.held[: -(-length // self._config.page_size)]
    return Match(length, match.last_logits if length == size else None, held)

  def count_lookup(self, prompt: bytes, match: Match) -> None:
    """Counts a lookup of a prompt."""
    count = self._lookups
    count["queries"] += 1
    count["hits" if match.length else "misses"] += 1
    count["tokens_queried"] += len(prompt) // TOKEN_BYTES
    count["tokens_hit"] += match.length

  def stats(self) -> PrefixStats:
    """The numbers."""
    return PrefixStats(
      **self._lookups,
      evictions=self._kept.count["evicted_pages"] - self._forgotten,
      entries=self.index.num_entries,
      cached_tokens=self.index.num_tokens,
    )

  # Stores

  def store(self, prefixes: Sequence[Prefix]) -> list[bool]:
    """Keeps the pages of several prefixes, in order; which were stored.

    The rows and the host hold the same pages; when a row ends, the host's hold remains:

        # row of A    [7][8][9]         refcount 2, holds 1        after A ends: 1, 1
        # index       [7][8][9]
    """
    keys = [self._key(prefix) for prefix in prefixes]
    held: list[int] = []
    dropped: list[int] = []
    stored = [self._store(*each, held, dropped) for each in zip(prefixes, keys)]
    self._turn.state.apply_ids("hold", held)
    self._kept.drop(dropped)
    return stored

  def _key(self, prefix: Prefix) -> bytes:
    """The encoded tokens of a prefix that its sequence holds."""
    row, ttl = self._sequences.running(prefix.handle), prefix.ttl
    start, length = self._sequences.bounds(row)
    tokens = self._sequences.known(row, length) if prefix.tokens is None else prefix.tokens
    if len(tokens) > length or start:
      raise self._sequences.unmapped(prefix.handle, len(tokens))
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or ttl < 0):
      raise ValueError(f"ttl must be None or a number of seconds, got {ttl!r}")
    return encoded(tokens)

  def _store(self, prefix: Prefix, key: bytes, held: list[int], dropped: list[int]) -> bool:
    """Notes a prefix, and the pages to `hold` and to `drop` for it; whether it was stored."""
    handle, row = prefix.handle, self._sequences.running(prefix.handle)
    if self.index.full(handle.namespace, key):
      evicted = self._reclaim.evict_entry()
      if evicted is None:
        return False
      dropped += self._reclaim.given_up(evicted)
    count, known = len(key) // TOKEN_BYTES, len(held)
    pages = self._turn.state.ledger.block_tables[row, : -(-count // self._config.page_size)]

    def keep(first: int) -> list[Held]:
      kept_pages, fresh = self._kept.at(pages[first:].tolist())
      held.extend(fresh)
      return kept_pages

    released = self.index.store(
      handle.namespace, key, keep, last_logits=prefix.last_logits, ttl=prefix.ttl,
      pinned=prefix.pinned,
    )  # fmt: skip
    if released is None:
      return False
    dropped += self._kept.forget(released)
    self._turn.event("stored", handle.request_id, len(held) - known, count)
    return True

  def clear(self, *, pinned: bool, reset_counters: bool) -> int:
    """Forgets every prefix, or all except pinned ones; how many stored sequences are gone."""
    before = self.index.num_entries
    if pinned:
      self._kept.let_go(self.index.clear())
    else:
      self._kept.let_go(self._reclaim.unpinned())
    if reset_counters:
      self._lookups = dict.fromkeys(self._lookups, 0)
      self._forgotten = self._kept.count["evicted_pages"]
    self._turn.event("removed", None, 0, 0)
    return before - self.index.num_entries
