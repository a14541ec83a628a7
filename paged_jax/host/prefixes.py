"""The prefix cache: lookups, and prefixes whose pages are kept for later requests."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from paged_jax.host.config import Request
from paged_jax.host.pools import Pools, Start
from paged_jax.host.prefix import TOKEN_BYTES, Match, encoded
from paged_jax.host.sequences import Handle, Sequences


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
    pools: Have the prefixes.
  """

  def __init__(self, sequences: Sequences, pools: Pools):
    self._sequences, self._pools, self._turn = sequences, pools, sequences.turn
    self._state = self._turn.state
    self._lookups = dict.fromkeys(("queries", "hits", "misses", "tokens_queried", "tokens_hit"), 0)
    self._forgotten = 0  # evictions before the counters were reset

  # Lookups

  def find(self, namespace: Hashable, tokens: bytes) -> Match:
    """The longest stored prefix; it counts as a lookup and as used."""
    start = self._pools.find(namespace, tokens, lambda length, logits: length, touch=True)
    self.count_lookup(tokens, start)
    return Match(start.length, start.last_logits, self._state.like(start.held))

  def match(self, request: Request, prompt: bytes, *, touch: bool) -> Start:
    """The longest stored prefix of a request's prompt, cut to the tokens that the request can use.

    `touch` says whether the prefix counts as used.
    """
    if not (prompt and self._turn.options.prefix_cache):
      return self._pools.nothing
    size = len(prompt) // TOKEN_BYTES
    most = size if request.only_cached else request.num_tokens

    def limit(length: int, logits: Any) -> int:
      length = min(length, most)
      if logits is None:
        length = min(length, size - 1)  # the last token must be computed, for its logits
      if not self._state.copy_on_write:
        length -= length % self._state.page_size
      return length

    return self._pools.find(request.namespace, prompt, limit, touch=touch)

  def count_lookup(self, prompt: bytes, start: Start) -> None:
    """Counts a lookup of `prompt` that found `start`."""
    count = self._lookups
    count["queries"] += 1
    count["hits" if start.length else "misses"] += 1
    count["tokens_queried"] += len(prompt) // TOKEN_BYTES
    count["tokens_hit"] += start.length

  def stats(self) -> PrefixStats:
    """The prefix cache's numbers."""
    return PrefixStats(
      **self._lookups,
      evictions=self._evictions - self._forgotten,
      entries=self._pools.ends.num_entries,
      cached_tokens=self._pools.ends.num_tokens,
    )

  @property
  def _evictions(self) -> int:
    return sum(kept.count["evicted_pages"] for kept in self._pools.kept)

  # Stores

  def store(self, prefixes: Sequence[Prefix]) -> list[bool]:
    """Keeps the pages of several prefixes, in order; returns which were stored.

    The row and the host hold the same pages. When the row's sequence ends, the host's hold remains:

    # row of A    [7][8][9]         refcount 2, holds 1        after A ends: 1, 1
    # index       [7][8][9]
    """
    keys = [self._key(prefix) for prefix in prefixes]
    fresh, gone = ([[] for _ in self._pools.kept] for _ in range(2))
    stored = [self._store(*each, fresh, gone) for each in zip(prefixes, keys)]
    for kept, pages, dropped in zip(self._pools.kept, fresh, gone):
      kept.hold(pages)
      kept.drop(dropped)
    return stored

  def _key(self, prefix: Prefix) -> bytes:
    """The encoded tokens of a prefix; raises unless its sequence holds them."""
    row, ttl = self._sequences.running(prefix.handle), prefix.ttl
    length = self._sequences.length(prefix.handle)
    tokens = self._sequences.known(row, length) if prefix.tokens is None else prefix.tokens
    if len(tokens) > length or self._sequences.slid(row):
      raise self._sequences.unmapped(prefix.handle, len(tokens))
    if ttl is not None and (
      isinstance(ttl, bool) or not isinstance(ttl, int | float) or not ttl >= 0
    ):
      raise ValueError(f"ttl must be None or a number of seconds, got {ttl!r}")
    return encoded(tokens)

  def _store(
    self, prefix: Prefix, key: bytes, fresh: list[list[int]], gone: list[list[int]]
  ) -> bool:
    """Puts a prefix into the indexes; returns whether it was stored.

    Adds to `fresh` the pages that the ledger must `hold` for it, and to `gone` those to `drop`.
    """
    handle, row = prefix.handle, self._sequences.running(prefix.handle)
    known = sum(map(len, fresh))
    stored = self._pools.store(
      handle.namespace, key, row, fresh, gone, last_logits=prefix.last_logits, ttl=prefix.ttl,
      pinned=prefix.pinned,
    )  # fmt: skip
    if stored:
      num_tokens = len(key) // TOKEN_BYTES
      self._turn.event("stored", handle.request_id, sum(map(len, fresh)) - known, num_tokens)
    return stored

  def clear(self, *, pinned: bool, reset_counters: bool) -> int:
    """Forgets every prefix, or all except pinned ones; returns how many."""
    before = self._pools.ends.num_entries
    self._pools.clear(pinned=pinned)
    if reset_counters:
      self._lookups = dict.fromkeys(self._lookups, 0)
      self._forgotten = self._evictions
    self._turn.event("removed", None, 0, 0)
    return before - self._pools.ends.num_entries
