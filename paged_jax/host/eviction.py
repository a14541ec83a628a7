"""In which order cached things go: a policy is a value, and a queue asks it."""

import contextlib
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar


@dataclasses.dataclass(slots=True)
class Use:
  """How a thing was used. Times are ticks of the index: one for each lookup or store."""

  stored: int
  last: int
  hits: int = 0
  num_tokens: int = 0  # from the beginning of the prompt
  touched: bool = False  # since the clock's hand passed


class Used(Protocol):
  """Something that keeps record of its use."""

  use: Use


class Policy(NamedTuple):
  """What goes first: the lowest `rank`. A rank must not fall while a thing waits.

  Example: the least often used prefix goes first, the shortest among equals.

  >>> from paged_jax.host import eviction
  >>> rarest = eviction.Policy("rarest", lambda use: (use.hits, use.num_tokens))
  """

  name: str
  rank: Callable[[Use], Any]
  second_chance: bool = False  # what was used since it came up goes to the end instead


LRU = Policy("lru", lambda use: use.last)
FIFO = Policy("fifo", lambda use: use.stored)
CLOCK = Policy("clock", lambda use: use.stored, second_chance=True)


Thing = TypeVar("Thing", bound=Used)


class Queue(Generic[Thing]):
  """Things in the order of a policy, at O(log n) each. Ranks are read again when a thing comes up.

  Args:
    policy: What goes first.
    now: The next tick.
    alive: Whether a thing still belongs here; those that do not are forgotten.
  """

  def __init__(self, policy: Policy, now: Callable[[], int], alive: Callable[[Thing], bool]):
    self._policy, self._now, self._alive = policy, now, alive
    self._number = itertools.count()
    self._heap: list = []
    self._new: list[Thing] = []  # not in the heap yet: most things die before anything is popped
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
    """The first thing that is `ready`; the others wait on."""
    with contextlib.closing(self.pops(ready)) as things:
      return next(things, None)

  def pops(self, ready: Callable[[Thing], bool]) -> Generator[Thing, None, None]:
    """Every thing that is `ready`, the first one first; the others wait on when it is closed."""
    waiting: dict[int, Thing] = {}
    try:
      while self._heap or self._new:
        for thing in self._new:
          heapq.heappush(self._heap, self._item(thing))
        self._new.clear()
        rank, number, thing = heapq.heappop(self._heap)
        if id(thing) in waiting or not self._alive(thing):
          continue
        if self._policy.second_chance and thing.use.touched:
          thing.use.touched, thing.use.stored = False, self._now()
        current = self._policy.rank(thing.use)
        if current != rank:
          heapq.heappush(self._heap, (current, number, thing))
        elif ready(thing):
          yield thing
        else:
          waiting[id(thing)] = thing
    finally:
      self._new += waiting.values()
