"""What happened to pages, as a stream that can be followed from another process.

Bounded and still lossless: a reader that falls behind further than the buffer reaches gets a
snapshot of what is there now, and goes on from it.
"""

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple


class Event(NamedTuple):
  """One thing that happened; `number` counts from 1 without gaps."""

  number: int
  kind: str  # stored, removed, evicted, spilled, swapped_out, swapped_in, forked, ...
  request_id: Hashable  # None where no request is meant
  num_pages: int
  num_tokens: int


class Batch(NamedTuple):
  """What a reader gets: go on with `since=last`."""

  snapshot: object | None  # the state before `events`, if some in between are gone
  events: Sequence[Event]
  last: int  # number of the newest event


class Stream:
  """The last `size` events."""

  def __init__(self, size: int, snapshot: Callable[[], object]):
    self._events: collections.deque[Event] = collections.deque(maxlen=size)
    self._snapshot = snapshot
    self.last = 0

  def add(self, kind: str, request_id: Hashable, num_pages: int, num_tokens: int) -> None:
    """Appends an event; the oldest one may go."""
    self.last += 1
    self._events.append(Event(self.last, kind, request_id, num_pages, num_tokens))

  def read(self, since: int) -> Batch:
    """Everything after event number `since`."""
    first = self.last - len(self._events) + 1
    if since + 1 < first:
      return Batch(self._snapshot(), (), self.last)
    return Batch(None, [each for each in self._events if each.number > since], self.last)
