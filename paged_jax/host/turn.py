"""One change of a manager at a time: the lock, the reports of programs, pressure and events."""

import contextlib
import threading
from collections.abc import Hashable, Iterator

from paged_jax.config import CacheConfig
from paged_jax.host import errors, events, pressure
from paged_jax.host.config import ManagerConfig
from paged_jax.host.kept import Kept
from paged_jax.host.state import Ticket


class Turn:
  """What every change of a manager goes through.

  Args:
    kept: The pages that the host keeps, and the cache.
    config: The cache's, as the user gave it; in canary mode the stored one has one more layer.
    options: The manager's.
    stream: Where events go.
  """

  def __init__(
    self, kept: Kept, config: CacheConfig, options: ManagerConfig, stream: events.Stream
  ):
    self.state, self.kept, self.config, self.options = kept.state, kept, config, options
    self.lock = threading.Lock()
    self.num_refusals = 0
    self.num_reports = 0  # times that reports of programs were taken over
    self.notifier = pressure.Notifier(self.level())
    self.events = stream

  @contextlib.contextmanager
  def change(self, *, wait: bool = True, last: Ticket | None = None) -> Iterator[None]:
    """Runs one change under the lock.

    First, if it is to `wait`, takes over the reports of programs up to `last`, by default of all.
    Afterwards updates the counts and, outside the lock, calls the pressure callbacks.
    """
    try:
      with self.lock:
        if wait and self.state.settle(last):
          self.num_reports += 1
          self.kept.count_pages()
        try:
          yield
        except (errors.OutOfPages, errors.OutOfHostPages, errors.OutOfRows):
          self.num_refusals += 1
          raise
        finally:
          self.notifier.observe(self.level(), self.state.num_free)
    finally:
      self.notifier.deliver()

  def level(self) -> pressure.Level:
    """How full the pool is."""
    low, high = self.options.low_watermark, self.options.high_watermark
    return pressure.level(self.state.num_free, self.config.num_pages, low, high)

  def event(self, kind: str, request_id: Hashable, num_pages: int, num_tokens: int) -> None:
    """Notes what happened to a request's pages."""
    self.events.add(kind, request_id, num_pages, num_tokens)

  def left(self, kind: str, num_pages: int) -> None:
    """Notes that pages of the prefix cache left."""
    self.events.add(kind, None, num_pages, num_pages * self.config.page_size)
