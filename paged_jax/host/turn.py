"""One change of a manager at a time: the lock, the reports of programs, pressure and events."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

from paged_jax.config import CacheConfig
from paged_jax.host import errors, events, pressure
from paged_jax.host.config import ManagerConfig
from paged_jax.host.kept import Kept
from paged_jax.host.state import Ticket


class Turn:
  """The frame of every change of a manager.

  Args:
    kept: The held pages, and the cache.
    config: The user's; in canary mode the stored cache has one more layer.
    options: The manager's.
    stream: Gets the events.
  """

  def __init__(
    self, kept: Kept, config: CacheConfig, options: ManagerConfig, stream: events.Stream
  ):
    self.state, self.kept, self.config, self.options = kept.state, kept, config, options
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
          self.kept.count_pages()
        try:
          yield
          self.tidy()
        except (errors.OutOfPages, errors.OutOfHostPages, errors.OutOfRows):
          self.num_refusals += 1
          raise
        finally:
          self.notifier.observe(self.level(), self.state.num_free)
    finally:
      self.notifier.deliver()

  def level(self) -> pressure.Level:
    """The pressure level now."""
    low, high = self.options.low_watermark, self.options.high_watermark
    return pressure.level(self.state.num_free, self.config.num_pages, low, high)

  def event(self, kind: str, request_id: Hashable, num_pages: int, num_tokens: int) -> None:
    """Notes an event of one sequence."""
    self.events.add(kind, request_id, num_pages, num_tokens)

  def left(self, kind: str, num_pages: int) -> None:
    """Notes that pages of the prefix cache left the device, or the cache."""
    self.events.add(kind, None, num_pages, num_pages * self.config.page_size)
