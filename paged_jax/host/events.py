"""Events: what happened to pages, as a stream that another process can follow.

The stream keeps a bounded number of events. A reader that comes too late for some of them gets a
snapshot of the state now, and goes on from there.
"""

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple


class Event(NamedTuple):
  """One event; `number` counts from 1 without gaps."""

  number: int
  kind: str  # stored, removed, evicted, spilled, swapped_out, swapped_in or forked
  request_id: Hashable  # None if the event is about no single sequence
  num_pages: int
  num_tokens: int


class Batch(NamedTuple):
  """What a reader gets. It asks for the next events with `since=last`."""

  snapshot: object | None  # tokens of each live sequence now, if some of the events are lost
  events: Sequence[Event]
  last: int  # number of the newest event


class Stream:
  """The last `size` events.

  Args:
    size: Events kept.
    snapshot: Returns the state now.
  """

  def __init__(self, size: int, snapshot: Callable[[], object]):
    self._events: collections.deque[Event] = collections.deque(maxlen=size)
    self._snapshot = snapshot
    self.last = 0

  def add(self, kind: str, request_id: Hashable, num_pages: int, num_tokens: int) -> None:
    """Adds an event; the oldest one is forgotten if there are too many."""
    self.last += 1
    self._events.append(Event(self.last, kind, request_id, num_pages, num_tokens))

  def read(self, since: int) -> Batch:
    """All events after event number `since`, or a snapshot."""
    first = self.last - len(self._events) + 1
    if since + 1 < first:
      return Batch(self._snapshot(), (), self.last)
    return Batch(None, [each for each in self._events if each.number > since], self.last)
