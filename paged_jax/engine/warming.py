"""Before the first request: proves the attention kernel, compiles every program, and measures what
preemption costs."""

import time
from collections.abc import Callable, Sequence

import jax

from paged_jax import groups
from paged_jax.engine import proofs
from paged_jax.engine.calls import Calls
from paged_jax.engine.config import EngineConfig
from paged_jax.engine.scheduler import Scheduler
from paged_jax.host import Manager
from paged_jax.host import Request as Allocation


def warm_up(
  manager: Manager,
  calls: Calls,
  scheduler: Scheduler,
  config: EngineConfig,
  variants: Sequence[bool],
  progress: Callable[[int, int], None],
) -> None:
  """See `Engine.warm_up`; `variants` are those of programs: True for requests that only draw."""
  proven = [proofs.backend(config.implementation, cache) for cache in config.caches]
  calls.implementation = groups.like(config.cache, proven)
  sizes = [None, *([0] if config.options.prefix_cache else []), *config.prompt_sizes]
  programs = [(size, None if plain else {}) for plain in variants for size in sizes]
  for done, (size, wanted) in enumerate(programs):
    progress(done, len(programs))
    for _ in range(2):  # the second one is timed
      began = time.perf_counter()
      prompts = None if size is None else calls.prompts([], size)
      calls.run(prompts, 1 if prompts else config.num_steps, wanted)
      calls.wait()
      if size:
        scheduler.prompt_seconds = (time.perf_counter() - began) / size
  calls.warm_up()
  manager.warm_up()
  if config.options.swapping and all(x > 0 for x in groups.each(config.options.num_host_pages)):
    _time_swaps(manager, scheduler, config)
  progress(len(programs), len(programs))


def _time_swaps(manager: Manager, scheduler: Scheduler, config: EngineConfig) -> None:
  """Swaps a few pages out and in again, if there are any."""
  room = (*groups.each(config.options.num_host_pages), *groups.each(manager.available_pages))
  count = min(4, *room, *(cache.pages_per_row for cache in config.caches))
  if not count or not manager.num_free_rows:
    return
  size = min(cache.page_size for cache in config.caches)
  handle = manager.allocate(Allocation(_time_swaps, count * size))
  num_pages = handle.stats().num_pages
  began = time.perf_counter()
  manager.swap_out(handle)
  manager.swap_in(handle)
  jax.block_until_ready(manager.cache)
  scheduler.swap_seconds = (time.perf_counter() - began) / (2 * num_pages)
  manager.deallocate(handle.request_id)
