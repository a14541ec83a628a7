"""The prefix cache: lookups, and prefixes whose pages are kept for later requests."""

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
  """A prefix to store, for `Manager.store_prefixes`; `Manager.store_prefix` explains the fields.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> handle = manager.allocate(host.Request("a", tokens=range(20)))
  >>> manager.store_prefixes([host.Prefix(handle, range(16), pinned=True), host.Prefix(handle)])
  [True, True]
  """

  handle: Handle
  tokens: Sequence[int] | np.ndarray | None = None  # None = all that the manager knows
  last_logits: Any = None
  ttl: float | None = None  # seconds, None = no end
  pinned: bool = False


class PrefixStats(NamedTuple):
  """The prefix cache's numbers. A hit is a lookup that found at least one token.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> manager.find_prefix(range(20)).length
  0
  >>> manager.prefix_stats().misses, manager.prefix_stats().hit_rate
  (1, 0.0)
  """

  queries: int
  hits: int
  misses: int
  tokens_queried: int
  tokens_hit: int
  evictions: int  # device pages that the prefix cache gave up
  entries: int  # stored prefixes
  cached_tokens: int  # tokens stored; those that prefixes share count once

  @property
  def hit_rate(self) -> float:
    """Hits per query."""
    return self.hits / self.queries if self.queries else 0.0


class Prefixes:
  """Lookups and stores. Not thread-safe: callers are inside a `turn.change` or its lock.

  Args:
    sequences: The live sequences.
    reclaim: Removes a stored prefix when the index is full.
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
    """The longest stored prefix; it counts as a lookup and as used."""
    match = self.index.find(namespace, tokens)
    self.count_lookup(tokens, match)
    return match

  def match(self, request: Request, prompt: bytes, *, touch: bool) -> Match:
    """The longest stored prefix of a request's prompt, cut to the tokens that the request can use.

    `touch` says whether the prefix counts as used.
    """
    if not (prompt and self._turn.options.prefix_cache):
      return NOTHING
    look_up: Callable[[Hashable, bytes], Match] = self.index.find if touch else self.index.peek
    match, size = look_up(request.namespace, prompt), len(prompt) // TOKEN_BYTES
    length = min(match.length, request.num_tokens)
    if match.last_logits is None:
      length = min(length, size - 1)  # the last token must be computed, for its logits
    if not self._config.copy_on_write:
      length -= length % self._config.page_size
    held = match.held[: -(-length // self._config.page_size)]
    return Match(length, match.last_logits if length == size else None, held)

  def count_lookup(self, prompt: bytes, match: Match) -> None:
    """Counts a lookup of `prompt` that found `match`."""
    count = self._lookups
    count["queries"] += 1
    count["hits" if match.length else "misses"] += 1
    count["tokens_queried"] += len(prompt) // TOKEN_BYTES
    count["tokens_hit"] += match.length

  def stats(self) -> PrefixStats:
    """The prefix cache's numbers."""
    return PrefixStats(
      **self._lookups,
      evictions=self._kept.count["evicted_pages"] - self._forgotten,
      entries=self.index.num_entries,
      cached_tokens=self.index.num_tokens,
    )

  # Stores

  def store(self, prefixes: Sequence[Prefix]) -> list[bool]:
    """Keeps the pages of several prefixes, in order; returns which were stored.

    The row and the host hold the same pages. When the row's sequence ends, the host's hold remains:

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
    """The encoded tokens of a prefix; raises unless its sequence holds them."""
    row, ttl = self._sequences.running(prefix.handle), prefix.ttl
    start, length = self._sequences.bounds(row)
    tokens = self._sequences.known(row, length) if prefix.tokens is None else prefix.tokens
    if len(tokens) > length or start:
      raise self._sequences.unmapped(prefix.handle, len(tokens))
    if ttl is not None and (
      isinstance(ttl, bool) or not isinstance(ttl, int | float) or not ttl >= 0
    ):
      raise ValueError(f"ttl must be None or a number of seconds, got {ttl!r}")
    return encoded(tokens)

  def _store(self, prefix: Prefix, key: bytes, held: list[int], dropped: list[int]) -> bool:
    """Puts a prefix into the index; returns whether it was stored.

    Adds to `held` the pages that the ledger must `hold` for it, and to `dropped` those to `drop`.
    """
    handle, row = prefix.handle, self._sequences.running(prefix.handle)
    if self.index.full(handle.namespace, key):
      evicted = self._reclaim.evict_entry()
      if evicted is None:
        return False
      dropped += self._reclaim.given_up(evicted)
    count, known = len(key) // TOKEN_BYTES, len(held)
    pages = self._turn.state.ledger.groups[0].block_tables[
      row, : -(-count // self._config.page_size)
    ]

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
    """Forgets every prefix, or all except pinned ones; returns how many."""
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
