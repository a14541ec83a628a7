"""The order of eviction: a policy is a value, and a queue follows it."""

import contextlib
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar


@dataclasses.dataclass(slots=True)
class Use:
  """How a prefix was used. Times are ticks of the index: one for each lookup or store."""

  stored: int  # tick of the store
  last: int  # tick of the newest use
  hits: int = 0  # lookups that found it
  num_tokens: int = 0  # from the start of the prompt to its end
  touched: bool = False  # whether it was used since CLOCK last passed it


class Used(Protocol):
  """A thing with a record of its use."""

  use: Use


class Policy(NamedTuple):
  """An order of eviction: the prefix of the lowest `rank` goes first.

  The rank of a prefix must not fall while the prefix is stored. Here the prefix with the fewest
  hits goes first, and the shortest of equals:

  >>> from paged_jax import host
  >>> rarest = host.eviction.Policy("rarest", lambda use: (use.hits, use.num_tokens))
  >>> host.ManagerConfig(eviction=rarest).eviction.name
  'rarest'
  """

  name: str
  rank: Callable[[Use], Any]
  second_chance: bool = False  # a prefix used since its last turn goes to the end instead, once


LRU = Policy("lru", lambda use: use.last)
FIFO = Policy("fifo", lambda use: use.stored)
CLOCK = Policy("clock", lambda use: use.stored, second_chance=True)


Thing = TypeVar("Thing", bound=Used)


class Queue(Generic[Thing]):
  """Things in the order of a policy, at O(log n) each.

  A thing's rank is read again when its turn comes.

  Args:
    policy: The order.
    now: Returns the next tick.
    alive: Whether a thing still belongs in the queue; the queue forgets the others.
  """

  def __init__(self, policy: Policy, now: Callable[[], int], alive: Callable[[Thing], bool]):
    self._policy, self._now, self._alive = policy, now, alive
    self._number = itertools.count()
    self._heap: list = []
    self._new: list[Thing] = []  # pushed, not in the heap yet: most leave before a pop
    self._limit = 64

  def push(self, thing: Thing) -> None:
    """Adds a thing, or adds it again."""
    self._new.append(thing)
    if len(self._heap) + len(self._new) > self._limit:
      everything = [each for *_, each in self._heap] + self._new
      self._heap, self._new = [], list({id(x): x for x in everything if self._alive(x)}.values())
      self._limit = 2 * len(self._new) + 64

  def __iter__(self) -> Iterator[Thing]:
    return itertools.chain((each for *_, each in self._heap), self._new)

  def _item(self, thing: Thing) -> tuple:
    return self._policy.rank(thing.use), next(self._number), thing

  def pop(self, ready: Callable[[Thing], bool]) -> Thing | None:
    """Removes the first thing that is `ready`, and returns it; None if no thing is."""
    with contextlib.closing(self.pops(ready)) as things:
      return next(things, None)

  def pops(self, ready: Callable[[Thing], bool]) -> Generator[Thing, None, None]:
    """Removes the things that are `ready`, in order; the others stay in the queue."""
    waiting: dict[int, Thing] = {}
    try:
      while self._heap or self._new:
        for thing in self._new:
          heapq.heappush(self._heap, self._item(thing))
        self._new.clear()
        rank, number, thing = self._heap[0]
        if id(thing) in waiting or not self._alive(thing):
          heapq.heappop(self._heap)
          continue
        if self._policy.second_chance and thing.use.touched:
          thing.use.touched, thing.use.stored = False, self._now()
        current = self._policy.rank(thing.use)  # before anything is removed: it may raise
        heapq.heappop(self._heap)
        if current != rank:
          heapq.heappush(self._heap, (current, number, thing))
        elif ready(thing):
          yield thing
        else:
          waiting[id(thing)] = thing
    finally:
      self._new += waiting.values()
