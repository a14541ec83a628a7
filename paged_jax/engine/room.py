"""Room for samples, in pages of each group: what is free, what is available, what is needed.

*free* pages have no holder. *available* are those and the ones that eviction could free. *needed* are
the most that something may take at once. All are known without a look at the device: a call is
dispatched only if the pages that it and the unread calls before it need are free, so that a call cannot
run dry. Numbers of pages are i64[G], one for each group of layers.
"""

import numpy as np

from paged_jax.config import CacheConfig
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
    self._sizes = np.array([cache.page_size for cache in config.caches])
    # A row takes its text's pages at once, or with windows as it computes, and then gives up others.
    self.step = config.width if config.windowed else None
    self._most = np.array([_most(cache, config.width) for cache in config.caches])
    budget = [cache.window is not None and config.prompt_sizes[-1] for cache in config.caches]
    self._pieces = -(-np.array(budget, np.int64) // self._sizes)  # of the prompts of one call

  def pages(self, num_tokens: int) -> np.ndarray:
    """Most pages that a row of so many tokens has, those of a piece of its prompt not counted."""
    return np.minimum(self.pages_of_text(num_tokens), self._most)

  def most_pages(self, prompt_length: int, num_beams: int, num_tokens: int) -> np.ndarray:
    """Most pages that a sample, or the beams of a search together, hold at so many tokens each."""
    shared = prompt_length // self._sizes if num_beams > 1 else np.zeros_like(self._sizes)
    shared = np.where(self._most < self.pages_of_text(num_tokens), 0, shared)
    return shared + num_beams * (self.pages(num_tokens) - shared)

  def pages_of_text(self, num_tokens: int) -> np.ndarray:
    """Pages that so many tokens fill."""
    return -(-num_tokens // self._sizes)

  def check_size(self, prompt_length: int, num_beams: int, num_tokens: int) -> None:
    """Raises ValueError if a sample, or a search, could never have its pages; see `most_pages`."""
    needed = self.most_pages(prompt_length, num_beams, num_tokens)
    # Two pieces of its prompt: the last one, whose pages it keeps until it grows, and the next one.
    needed = np.minimum(needed + 2 * self._pieces, num_beams * self.pages_of_text(num_tokens))
    for group, (pages, cache) in enumerate(zip(needed.tolist(), self._config.caches)):
      if pages > cache.num_pages:
        place = f" in group {group}" if len(needed) > 1 else ""
        raise ValueError(f"the request needs {pages} pages{place}, but there are {cache.num_pages}")

  @property
  def free(self) -> np.ndarray:
    """Pages without a holder."""
    return vector(self._manager.num_free)

  @property
  def available(self) -> np.ndarray:
    """Pages that are free, or that eviction could free."""
    return self.free + vector(self._manager.num_reclaimable)

  def needed(self, num_steps: int) -> np.ndarray:
    """Most pages that a call of so many steps, and the unread calls before it, may take."""
    pages, width = np.zeros_like(self._sizes), self._config.width
    lengths = np.zeros(self._config.num_rows, np.int32)
    for row, sample in self._queue.running.items():
      steps = sample.pending
      if num_steps and sample.draws:
        steps += num_steps
      if self.step is not None and sample.unread and sample is sample.beams[0]:
        lengths[row] = sample.length  # its text takes its pages step by step
      if not steps:
        continue
      if not sample.searching:
        lengths[row] = sample.reach(steps * width)
      elif sample is sample.beams[0]:
        most = max(beam.reach(steps * width) for beam in sample.beams)
        handles = [beam.handle for beam in sample.beams if beam.handle]
        more = self._manager.pages_to_search(handles, most, len(sample.request.prompt))
        pages = pages + vector(more)
    needed = vector(self._manager.pages_to_reach(lengths))
    if self.step is not None:
      at_once = vector(self._manager.pages_to_reach(lengths, step=self.step))
      needed = np.minimum(needed, at_once + self._pieces)
    return pages + needed

  def fits(self, num_steps: int) -> bool:
    """Whether the pages that a call of so many steps needs are free."""
    return within(self.needed(num_steps), self.free)

  def check(self, needed: np.ndarray) -> None:
    """Raises unless so many pages are available, or nobody runs who might give some back.

    Raises:
      OutOfPages: They are not.
    """
    if not self._queue.running or within(needed, self.free):
      return
    if not within(needed, available := self.available):
      raise _lack(needed, available)

  def lack(self, needed: np.ndarray) -> errors.OutOfPages:
    """The error of the first group that has fewer free pages than needed."""
    return _lack(needed, self.free)


def _most(cache: CacheConfig, step: int) -> int:
  """Most pages that a row has at once, if it grows by `step` tokens at a time."""
  if cache.window is None:
    return cache.pages_per_row
  return -(-(cache.window - 2 + step) // cache.page_size) + 1  # of window - 1 + step tokens


def _lack(needed: np.ndarray, there: np.ndarray) -> errors.OutOfPages:
  """The error of the first group that needs more pages than there are."""
  group = int(np.argmax(needed > there))
  return errors.OutOfPages(
    int(needed[group]), int(there[group]), group if len(needed) > 1 else None
  )


def vector(pages) -> np.ndarray:
  """Numbers of pages of all groups as i64[G]."""
  return np.atleast_1d(np.asarray(pages, np.int64))


def given(pages: np.ndarray) -> int | tuple[int, ...]:
  """Numbers of pages in the form that a manager takes."""
  listed = pages.tolist()
  return tuple(listed) if len(listed) > 1 else listed[0]


def within(needed: np.ndarray, there: np.ndarray) -> bool:
  """Whether no group needs more pages than there are."""
  return bool((needed <= there).all())
