"""Memory pressure: how full the pool is, in four levels, and the callbacks for changes.

With several pools the fullest one counts.
"""

import collections
import enum
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

_LOG = logging.getLogger(__name__)


class Level(enum.IntEnum):
  """How full the pool is, by the fraction of pages that are free and the two watermarks.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> manager.check_pressure() < host.Level.HIGH
  True
  """

  LOW = 0  # at or above the low watermark
  MEDIUM = 1  # below the low watermark
  HIGH = 2  # below the high watermark
  CRITICAL = 3  # no page is free


class Change(NamedTuple):
  """A change of the level, from `left` to `entered`, with `num_free` pages free."""

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
  """Calls subscribers about changes of the level, in order. Only `deliver` is thread-safe."""

  def __init__(self, start: Level):
    self.level = start
    self._subscriptions: list[
      list[Callback]
    ] = []  # each in its own list, so that equal callbacks differ
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
    """Notes the level after a change of the manager."""
    if entered != self.level:
      self._changes.append(Change(self.level, entered, num_free))
      self.level = entered

  def deliver(self) -> None:
    """Calls the callbacks about all noted changes, in order. The caller must not hold the lock.

    One thread delivers at a time. If another thread, or a callback, calls this meanwhile, the call
    returns at once, and the first thread delivers for it.
    """
    while self._changes and self._delivering.acquire(blocking=False):
      try:
        while self._changes:
          self._call(self._changes.popleft())
      finally:
        self._delivering.release()

  def _call(self, change: Change) -> None:
    """Calls every callback."""
    for (callback,) in self._subscriptions:
      try:
        callback(change)
      except Exception:
        # The request that changed the level is not to blame for a callback's error.
        _LOG.exception("a pressure callback failed at %s", change)
