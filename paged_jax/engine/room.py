"""Room for samples, in pages: what is free, what is available, what is needed.

*free* pages have no holder. *available* are those and the ones that eviction could free. *needed* are
the most that something may take. All are known without a look at the device: a call is dispatched only
if the pages that it and the unread calls before it need are free, so that a call cannot run dry.
"""

import numpy as np

from paged_jax.engine.config import EngineConfig
from paged_jax.engine.queue import Queue
from paged_jax.host import Manager, errors


class Room:
  """Counts pages.

  Args:
    manager: Of the pages.
    queue: Who runs.
    config: Of the engine.
  """

  def __init__(self, manager: Manager, queue: Queue, config: EngineConfig):
    self._manager, self._queue, self._config = manager, queue, config

  def pages(self, num_tokens: int) -> int:
    """Pages that so many tokens fill."""
    return -(-num_tokens // self._config.cache.page_size)

  def most_pages(self, prompt_length: int, num_beams: int, num_tokens: int) -> int:
    """Most pages that a sample, or the beams of a search together, hold at so many tokens each."""
    shared = prompt_length // self._config.cache.page_size if num_beams > 1 else 0
    return shared + num_beams * (self.pages(num_tokens) - shared)

  @property
  def free(self) -> int:
    """Pages without a holder."""
    return self._manager.num_free

  @property
  def available(self) -> int:
    """Pages that are free, or that eviction could free."""
    return self._manager.num_free + self._manager.num_reclaimable

  def needed(self, num_steps: int) -> int:
    """Most pages that a call of so many steps, and the unread calls before it, may take."""
    pages, width = 0, self._config.width
    lengths = np.zeros(self._config.cache.num_rows, np.int32)
    for row, sample in self._queue.running.items():
      steps = sample.pending
      if num_steps and sample.draws:
        steps += num_steps
      if not steps:
        continue
      if not sample.searching:
        lengths[row] = sample.reach(steps * width)
      elif sample is sample.beams[0]:
        most = max(beam.reach(steps * width) for beam in sample.beams)
        handles = [beam.handle for beam in sample.beams if beam.handle]
        pages += self._manager.pages_to_search(handles, most, len(sample.request.prompt))
    return pages + self._manager.pages_to_reach(lengths)

  def fits(self, num_steps: int) -> bool:
    """Whether the pages that a call of so many steps needs are free."""
    return self.needed(num_steps) <= self.free

  def check(self, needed: int) -> None:
    """Raises unless so many pages are available, or nobody runs who might give some back.

    Raises:
      OutOfPages: They are not.
    """
    if self._queue.running and self.free < needed and self.available < needed:
      raise errors.OutOfPages(needed=needed, free=self.available)
