"""One change of a manager at a time: the lock, the reports of programs, pressure and events."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from paged_jax import groups
from paged_jax.config import CacheConfig
from paged_jax.host import errors, events, pressure
from paged_jax.host.config import ManagerConfig, whole
from paged_jax.host.kept import Kept
from paged_jax.host.state import Ticket


class Turn:
  """The frame of every change of a manager.

  Args:
    kept: The held pages of each group, and the cache.
    config: The user's, of each group; in canary mode a stored cache has one more layer.
    options: The manager's.
    stream: Gets the events.
  """

  def __init__(
    self,
    kept: Sequence[Kept],
    configs: Sequence[CacheConfig],
    options: ManagerConfig,
    stream: events.Stream,
  ):
    self.state, self.kept, self.configs, self.options = kept[0].state, kept, configs, options
    self.lock = threading.Lock()
    self.num_refusals = 0
    self.notifier = pressure.Notifier(self.level())
    self.events = stream
    self.tidy: Callable[[], None] = lambda: None  # the end of each change

  @contextlib.contextmanager
  def change(self, *, wait: bool = True, last: Ticket | None = None) -> Iterator[None]:
    """Runs one change under the lock.

    # lock ─ take over reports ─ the change ─ tidy ─ note the level ─ unlock ─ pressure callbacks

    Args:
      wait: Whether to wait for the reports of programs, and take them over.
      last: The newest program whose report is taken over; None = all.
    """
    try:
      with self.lock:
        if wait and self.state.settle(last):
          self.count_pages()
        try:
          yield
          self.tidy()
        except (errors.OutOfPages, errors.OutOfHostPages, errors.OutOfRows):
          self.num_refusals += 1
          raise
        finally:
          level, num_free = max(self._levels(), key=lambda each: (each[0], -each[1]))
          self.notifier.observe(level, num_free)
    finally:
      self.notifier.deliver()

  def by_group(self, name: str, pages: Any) -> list[int]:
    """An argument with a number of pages for each group; one number counts for all."""
    given = pages if groups.several(pages) else (pages,) * len(self.configs)
    if len(given) != len(self.configs):
      raise ValueError(f"{name} must have {len(self.configs)} numbers, got {pages!r}")
    return [whole(name, each, 0) for each in given]

  def apply(self, verb: str, *operands: Any) -> None:
    """Applies one verb to all groups, which must grant it, and counts."""
    self.state.apply(verb, *operands)
    self.count_pages()

  def count_pages(self) -> None:
    """Counts pages taken and released since the last call, and the peak, of each group."""
    for each in self.kept:
      each.count_pages()

  def level(self) -> pressure.Level:
    """The pressure level now: that of the fullest pool."""
    return max(level for level, _ in self._levels())

  def _levels(self) -> list[tuple[pressure.Level, int]]:
    """The level and the free pages of each group."""
    low, high = self.options.low_watermark, self.options.high_watermark
    return [
      (pressure.level(each.book.num_free, each.config.num_pages, low, high), each.book.num_free)
      for each in self.kept
    ]

  def event(self, kind: str, request_id: Hashable, num_pages: int, num_tokens: int) -> None:
    """Notes an event of one sequence."""
    self.events.add(kind, request_id, num_pages, num_tokens)

  def left(self, kind: str, group: int, num_pages: int) -> None:
    """Notes that pages of the prefix cache left the device, or the cache."""
    self.events.add(kind, None, num_pages, num_pages * self.configs[group].page_size)
