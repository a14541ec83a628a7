"""The pools of all groups as one: verbs that all follow, room in each of them, ends of prefixes.

A group without a window keeps the pages of stored prefixes in a tree that all share. A group with a
window keeps, for each stored prefix, only the pages that a row needs to go on from its end: its
tail, in a tree of its own. Here W = 6 and a page has 4 tokens:

    # tokens             0 1 2 3 4 5 6 7 8 9 10 11 12      the prefix ends behind token 12
    # without a window   [a     ][b     ][c       ][d ]
    # with the window             [x     ][y       ][z ]    tokens from 4 on: 7 to 12, and one more,
    #                                                      so that token 12 may be computed again

A tail is evicted alone: then nobody can go on from its end, and other ends are as before.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from paged_jax.host import errors
from paged_jax.host.config import ManagerConfig
from paged_jax.host.holds import Held, latest_start
from paged_jax.host.kept import Kept
from paged_jax.host.prefix import TOKEN_BYTES, Match, Node, PrefixIndex, common, path
from paged_jax.host.reclaim import Collected, Evictable, Reclaim

Limit = Callable[[int, Any], int]
_ONE_PAGE = 2**30  # page size of an index that finds ends and has no pages


class Start(NamedTuple):
  """Cached tokens that a row can start with."""

  length: int
  last_logits: Any  # those of the query's last token, if exactly the query was stored with some
  held: tuple[list[Held], ...]  # the pages of each group
  starts: tuple[int, ...]  # first live token in each group


class Pools:
  """Held pages, prefix indexes and eviction of all groups. Not thread-safe.

  Args:
    kept: Of each group.
    options: The manager's.
    event: Called with an event's kind, a group and a number of pages when pages leave.
    clock: Returns seconds, for lifetimes.
  """

  def __init__(
    self,
    kept: Sequence[Kept],
    options: ManagerConfig,
    event: Callable[[str, int, int], None],
    clock: Callable[[], float],
  ):
    self.kept, self.state, self.clock = kept, kept[0].state, clock
    self.configs, self.books = self.state.configs, self.state.ledger.groups
    self._low = options.low_watermark
    most = options.max_prefixes if options.prefix_cache else 0

    def index(page_size: int, min_length: int) -> PrefixIndex:
      return PrefixIndex(page_size, max_entries=most, min_length=min_length, clock=clock)

    least = options.min_prefix_length
    self.indexes = [
      index(config.page_size, least if config.window is None else 1) for config in self.configs
    ]
    self.reclaims = [
      Reclaim(each, own, options, functools.partial(_report, event, each.group))
      for each, own in zip(kept, self.indexes)
    ]
    full = [x for x, config in zip(self.indexes, self.configs) if config.window is None]
    # The index that knows the end of every stored prefix; without pages if all groups have windows.
    self.ends = full[0] if full else index(_ONE_PAGE, least)
    self._pageless = None if full else Evictable(self.ends, options.eviction, self._used)
    # What the group of the ends gives up takes the tails of the others along, so it comes first.
    self._groups = sorted(range(len(kept)), key=lambda group: self.indexes[group] is not self.ends)
    if len(full) < len(kept):
      self.ends.ended = self._forget_tails

  @property
  def nothing(self) -> Start:
    """The start of a row for which nothing is cached."""
    return Start(0, None, tuple([] for _ in self.kept), (0,) * len(self.kept))

  # Prefixes

  def find(self, namespace: Hashable, prompt: bytes, limit: Limit, *, touch: bool) -> Start:
    """The longest start of `prompt` that every group has.

    Args:
      namespace: Of the prefixes.
      prompt: Tokens, `encoded`.
      limit: Most tokens that may be used, from those found and whether their logits are stored.
      touch: Whether the prefix counts as used.
    """
    matches: dict[int, Match] = {}
    for group, config in enumerate(self.configs):
      if config.window is None:
        index = self.indexes[group]
        matches[group] = (index.find if touch else index.peek)(namespace, prompt)
    if len(matches) == len(self.kept):
      shortest = min(matches.values(), key=lambda match: match.length)
      length = limit(shortest.length, shortest.last_logits)
      return self._start(length, shortest.last_logits, len(prompt), matches)
    if touch and self._pageless is not None:
      self.ends.find(namespace, prompt)  # it counts as used
    chain = min((match.length for match in matches.values()), default=len(prompt) // TOKEN_BYTES)
    for key in self.ends.ends(namespace, prompt):
      tails = {
        group: self.indexes[group].peek((namespace, key), self._tail(group, key))
        for group, config in enumerate(self.configs)
        if config.window is not None
      }
      if any(
        match.length * TOKEN_BYTES < len(self._tail(group, key)) for group, match in tails.items()
      ):
        continue  # part of a tail is evicted
      logits = self.ends.peek(namespace, prompt).last_logits if key == prompt else None
      length = limit(min(chain, common(key, prompt, 0)), logits)
      if length and all(self._sees(group, key, length) for group in tails):
        if touch:
          for group in tails:
            self.indexes[group].find((namespace, key), self._tail(group, key))
        return self._start(length, logits, len(prompt), matches | tails, key)
    return self.nothing

  def _start(
    self, length: int, logits: Any, size: int, matches: dict[int, Match], key: bytes = b""
  ) -> Start:
    """A start of `length` tokens on the pages of `matches`, by group; `size` bytes were asked for."""
    held, starts = [], []
    for group, config in enumerate(self.configs):
      pages = -(-length // config.page_size)
      start = first = 0
      if config.window is not None:
        start, first = latest_start(length, config.window), self._first_page(group, key)
      held.append(matches[group].held[start // config.page_size - first : pages - first])
      starts.append(start)
    whole = length * TOKEN_BYTES == size
    return Start(length, logits if whole else None, tuple(held), tuple(starts))

  def _first_page(self, group: int, key: bytes) -> int:
    """The logical page that a tail begins with; the end's last token may be computed again."""
    config = self.configs[group]
    length = len(key) // TOKEN_BYTES - 1
    if not config.copy_on_write:  # rows start on whole pages
      length -= length % config.page_size
    return latest_start(length, config.window) // config.page_size

  def _tail(self, group: int, key: bytes) -> bytes:
    """The tokens of a stored prefix whose pages a group keeps."""
    return key[self._first_page(group, key) * self.configs[group].page_size * TOKEN_BYTES :]

  def _sees(self, group: int, key: bytes, length: int) -> bool:
    """Whether the tail at the end of `key` has all that the token after the first `length` sees."""
    config = self.configs[group]
    first = self._first_page(group, key) * config.page_size
    return first <= latest_start(length, config.window)

  def _place(self, group: int, namespace: Hashable, key: bytes) -> tuple[Hashable, bytes]:
    """Namespace and tokens under which a group's index has a stored prefix, or its tail."""
    if self.configs[group].window is None:
      return namespace, key
    return (namespace, key), self._tail(group, key)

  def store(
    self,
    namespace: Hashable,
    key: bytes,
    row: int,
    fresh: list[list[int]],
    gone: list[list[int]],
    **fields: Any,
  ) -> bool:
    """Stores a prefix that a row holds, in every group, or in none.

    Adds to `fresh` the pages of each group that the ledger must `hold` for it, and to `gone` those
    to `drop`. `fields` are its logits, lifetime and pin.
    """
    whole = all(
      self.books[group].starts[row] // config.page_size <= self._first_page(group, key)
      for group, config in enumerate(self.configs)
    )
    if not (self.ends.storable(key) and whole and self._make_place(namespace, key, gone)):
      return False

    def keep(group: int, pages: slice, first: int) -> list[Held]:
      """The held pages of the row from number `first` of these `pages` on."""
      table = self.books[group].block_tables[row, pages][first:]
      held, new = self.kept[group].at(table.tolist())
      fresh[group] += new
      return held

    self.put(namespace, key, keep, gone, **fields)
    return True

  def put(
    self,
    namespace: Hashable,
    key: bytes,
    keep: Callable[[int, slice, int], list[Held]],
    gone: list[list[int]],
    *,
    last_logits: Any,
    ttl: float | None,
    pinned: bool,
  ) -> None:
    """Puts a prefix into the index of every group; there must be a place for it.

    `keep(group, pages, first)` returns the held pages from number `first` of the prefix's logical
    `pages` on. Adds to `gone` the pages of each group that the ledger must `drop`.
    """
    options: Any = dict(ttl=ttl, pinned=pinned)
    if self._pageless is not None:
      self.ends.store(namespace, key, _no_page, last_logits=last_logits, **options)
    for group in self._groups:
      held = functools.partial(keep, group, self._pages(group, key))
      place = self._place(group, namespace, key)
      logits = last_logits if self.indexes[group] is self.ends else None
      released = self.indexes[group].store(*place, held, last_logits=logits, **options)
      assert released is not None, "no place for a prefix"
      gone[group] += self.kept[group].forget(released)

  def _pages(self, group: int, key: bytes) -> slice:
    """The logical pages of a prefix, or of its tail, that a group keeps."""
    last = -(-(len(key) // TOKEN_BYTES) // self.configs[group].page_size)
    return slice(self._first_page(group, key), last)

  def stored(self) -> list[tuple[Hashable, bytes]]:
    """Namespace and tokens of every stored prefix, the one used last at the end."""
    nodes = [node for node in self.ends.nodes() if node.entry is not None]
    nodes.sort(key=lambda node: node.use.last)
    return [(entry.namespace, path(node)) for node in nodes if (entry := node.entry)]

  def has(self, namespace: Hashable, key: bytes) -> list[tuple[int, list[Held]]]:
    """Of each group how many pages a prefix, or its tail, takes, and the first of them, if kept.

    # prefix   0 1 2 3 4 5 6 7 8 9        a tree has 0 1 2 3 4 5 and 0 1 2 3 x
    # pages    [a     ][b     ][c ]       of three pages a is there; part of one does not count
    """
    found = []
    for group, config in enumerate(self.configs):
      pages, place = self._pages(group, key), self._place(group, namespace, key)
      match = self.indexes[group].peek(*place)
      whole = match.length * TOKEN_BYTES == len(place[1])
      held = match.held if whole else match.held[: match.length // config.page_size]
      found.append((pages.stop - pages.start, held))
    return found

  def takes(self, namespace: Hashable, key: bytes) -> bool:
    """Whether another prefix may be stored, and none must leave for it."""
    if self.ends.entry(namespace, key) is not None or not self.ends.storable(key):
      return False
    places = (self._place(group, namespace, key) for group in range(len(self.kept)))
    full = any(
      index.full(*place)
      for index, place, config in zip(self.indexes, places, self.configs)
      if config.window is None
    )
    return not full and not self.ends.full(namespace, key)

  def _make_place(self, namespace: Hashable, key: bytes, gone: list[list[int]]) -> bool:
    """Whether there is a place for another prefix in every index, once others have left.

    No index of tails is full: each of its tails belongs to a stored prefix.
    """
    if self._pageless is not None and self.ends.full(namespace, key):
      node = self._pageless.next_entry()
      if node is None:
        return False
      self.ends.retire(node)
    for group, (index, reclaim) in enumerate(zip(self.indexes, self.reclaims)):
      if self.configs[group].window is None and index.full(namespace, key):
        evicted = reclaim.evict_entry()
        if evicted is None:
          return False
        gone[group] += reclaim.given_up(evicted)
    return True

  def _forget_tails(self, namespace: Hashable, key: bytes) -> None:
    """Forgets the tails of a prefix that is stored no more."""
    for group, config in enumerate(self.configs):
      if config.window is not None:
        self.indexes[group].bury((namespace, key))

  def pin(self, namespace: Hashable, key: bytes, pinned: bool) -> bool:
    """Pins or unpins a stored prefix; False if there is none."""
    if not self.ends.pin(namespace, key, pinned):
      return False
    for group, index in enumerate(self.indexes):
      index.pin(*self._place(group, namespace, key), pinned)
    return True

  def _used(self, node: Node) -> bool:
    """Whether a row uses the last page of a tail of the prefix that ends at a node."""
    assert node.entry is not None
    namespace, key = node.entry.namespace, path(node)
    tails = (
      index.peek(*self._place(group, namespace, key)).held
      for group, index in enumerate(self.indexes)
    )
    return any(bool(tail) and tail[-1].busy for tail in tails)

  def evict_prefixes(self, count: int) -> int:
    """Removes up to `count` stored prefixes that no sequence uses; returns how many."""
    if self._pageless is None:
      done = self.reclaims[self._groups[0]].evict_entries(count)
      for config, index, reclaim in zip(self.configs, self.indexes, self.reclaims):
        if config.window is None:  # no group keeps more prefixes than there are ends
          reclaim.evict_entries(index.num_entries - self.ends.num_entries)
      return done
    self.tidy()
    done = 0
    while done < count and (node := self._pageless.next_entry()) is not None:
      self.ends.retire(node)
      done += 1
    return done

  def clear(self, *, pinned: bool) -> None:
    """Forgets every prefix, or all except pinned ones."""
    for kept, index, reclaim in zip(self.kept, self.indexes, self.reclaims):
      kept.let_go(index.clear() if pinned else reclaim.unpinned())
    if self._pageless is not None:
      for node in reversed(list(self.ends.nodes())):
        if node.entry is not None and (pinned or not node.entry.pinned):
          self.ends.retire(node)

  # Room

  @contextlib.contextmanager
  def guarding(self, held: Sequence[Iterable[Held]]) -> Iterator[None]:
    """Inside this context these pages of each group stay where they are."""
    with contextlib.ExitStack() as stack:
      for reclaim, own in zip(self.reclaims, held):
        stack.enter_context(reclaim.guarding(own))
      yield

  @property
  def available(self) -> list[int]:
    """Pages of each group that are free, or could be freed by eviction."""
    return [reclaim.available for reclaim in self.reclaims]

  def fits(self, needed: Sequence[int]) -> bool:
    """Whether so many pages of each group are available."""
    return all(
      own <= book.num_free or own <= reclaim.available
      for own, book, reclaim in zip(needed, self.books, self.reclaims)
    )

  def make_room(self, needed: Sequence[int], spare: Sequence[int] | None = None) -> None:
    """Evicts until `needed` pages of each group are free; see `Reclaim.make_room`.

    Raises:
      OutOfPages: Too few pages of a group are available; nothing was evicted.
    """
    for own, book, reclaim, kept in zip(needed, self.books, self.reclaims, self.kept):
      if own > book.num_free and own > reclaim.available:
        raise errors.OutOfPages(own, reclaim.available, kept.name)
    for group in self._groups:
      self.reclaims[group].make_room(needed[group], spare[group] if spare else 0)

  def to_device(self, held: Sequence[Iterable[Held]]) -> None:
    """Moves the held pages of each group that are in host memory back to the device."""
    for kept, own in zip(self.kept, held):
      kept.to_device([each for each in own if each.page is None])

  def end_swap(self, held: Sequence[Sequence[Held]]) -> None:
    """One swapped sequence less uses these pages of each group."""
    for kept, own in zip(self.kept, held):
      for each in own:
        kept.swap(each, -1)
      kept.let_go(dict.fromkeys(own))

  def expire(self) -> None:
    """Forgets the prefixes whose lifetime is over."""
    if self._pageless is not None:
      self.ends.expire()
    for group in self._groups:
      self.reclaims[group].expire()

  def tidy(self) -> None:
    """Frees the pages of prefixes that are gone, and counts what has changed."""
    if self._pageless is not None:
      self._pageless.settle()
    for reclaim in self.reclaims:
      reclaim.tidy()

  def collect(self, targets: Sequence[int | None]) -> Collected:
    """Forgets the prefixes whose lifetime is over, then evicts.

    Args:
      targets: Pages of each group to be free afterwards; None = as many as the low watermark asks.
    """
    began, entries, free = time.perf_counter(), self.ends.num_entries, self.state.num_free
    self.expire()
    for group in self._groups:
      target, num_pages = targets[group], self.configs[group].num_pages
      self.reclaims[group].reclaim(math.ceil(self._low * num_pages) if target is None else target)
    self.tidy()
    freed = [after - before for after, before in zip(self.state.num_free, free)]
    return Collected(
      num_pages=sum(freed),
      num_bytes=sum(pages * each.page_bytes for pages, each in zip(freed, self.configs)),
      num_entries=entries - self.ends.num_entries,
      seconds=time.perf_counter() - began,
    )

  def warm_up(self, options: ManagerConfig) -> None:
    """Compiles the verbs that these options need, for each size of a batch."""
    self.state.warm_up(
      holding=options.swapping or options.prefix_cache,
      swapping=[options.swapping and kept.num_host_pages > 0 for kept in self.kept],
      scrubbing=options.scrub,
    )


def _no_page(first: int) -> list[Held]:
  """The page of a prefix in an index that has no pages."""
  return [Held()] if not first else []


def _report(event: Callable[[str, int, int], None], group: int, kind: str, num_pages: int) -> None:
  event(kind, group, num_pages)
