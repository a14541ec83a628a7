"""How full the pool is, in four levels, and who wants to know."""

import collections
import enum
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

_LOG = logging.getLogger(__name__)


class Level(enum.IntEnum):
  """By the fraction of pages that are free, against the two watermarks."""

  LOW = 0  # at or above the low watermark
  MEDIUM = 1  # below the low watermark
  HIGH = 2  # below the high watermark
  CRITICAL = 3  # nothing is free


class Change(NamedTuple):
  """The level went from `left` to `entered`, with so many pages free."""

  left: Level
  entered: Level
  num_free: int


Callback = Callable[[Change], None]


def level(num_free: int, num_pages: int, low: float, high: float) -> Level:
  """The level with `num_free` of `num_pages` pages free."""
  if num_free == 0:
    return Level.CRITICAL
  if num_free / num_pages < high:
    return Level.HIGH
  return Level.MEDIUM if num_free / num_pages < low else Level.LOW


class Notifier:
  """Changes of level, in order, to everyone who subscribed. Not thread-safe but for `deliver`."""

  def __init__(self, start: Level):
    self.level = start
    self._subscriptions: list[list[Callback]] = []  # one each, to tell equal ones apart
    self._changes: collections.deque[Change] = collections.deque()
    self._delivering = threading.Lock()

  def subscribe(self, callback: Callback) -> Callable[[], None]:
    """Calls `callback` at every change from now on, until the returned function is called."""
    subscription = [callback]
    self._subscriptions = [*self._subscriptions, subscription]

    def unsubscribe():
      self._subscriptions = [each for each in self._subscriptions if each is not subscription]

    return unsubscribe

  def observe(self, entered: Level, num_free: int) -> None:
    """Notes the level after a transition."""
    if entered != self.level:
      self._changes.append(Change(self.level, entered, num_free))
      self.level = entered

  def deliver(self) -> None:
    """Calls back about what was noted, in order. The caller holds no lock of its own.

    One thread delivers at a time; whoever comes meanwhile, also from a callback, leaves it to it.
    """
    while self._changes and self._delivering.acquire(blocking=False):
      try:
        while self._changes:
          self._call(self._changes.popleft())
      finally:
        self._delivering.release()

  def _call(self, change: Change) -> None:
    for (callback,) in self._subscriptions:
      try:
        callback(change)
      except Exception:
        # A subscriber's fault is not that of the request which happened to change the level.
        _LOG.exception("a pressure callback failed at %s", change)
