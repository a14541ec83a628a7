"""Engines on one shape, so that all tests share their programs, and what must hold when they stop."""

import tiny

from paged_jax.engine import Engine, EngineConfig
from paged_jax.host import Request

SIZE, NUM_PAGES, NUM_ROWS = 4, 40, 8


class Words:
  """A tokenizer: a letter per token."""

  def decode(self, tokens):
    return "".join(chr(97 + token) for token in tokens)


def engine(*, model=tiny.MODEL, cache=None, options=None, num_pages=NUM_PAGES, mesh=None, **fields):
  """An engine on a pool of which others hold all but `num_pages` pages: one shape, one compilation."""
  config = EngineConfig(
    tiny.cache(num_pages=NUM_PAGES, num_rows=NUM_ROWS, **(cache or {})),
    tiny.options(**(options or {})),
    **(dict(num_steps=4, prompt_sizes=(16,), preemption="swap") | fields),
  )
  e = Engine(model, config, tokenizer=Words(), mesh=mesh)
  left = NUM_PAGES - num_pages
  while left:
    part = min(left, tiny.LONGEST // SIZE)
    e.manager.allocate(Request(("outsider", left), part * SIZE))
    left -= part
  return e


def finish(engine):
  """Runs what there is; then nothing is held, and everything adds up."""
  while engine.step():
    pass
  for handle in engine.manager.list_handles():
    assert handle.request_id[0] == "outsider"
    engine.manager.deallocate(handle.request_id)
  report = engine.audit()
  assert report.clean, report
  stats = engine.manager.stats()
  assert stats.free_pages + stats.reclaimable_pages == stats.num_pages


def force_preemption(e):
  """Takes the row of whoever came last."""
  e._read_all()
  e._scheduler.tidy()
  if e._queue.running:
    e._scheduler.preempt(e._queue.last())


PROMPTS = [(1, 2, 3), (5,), tuple(range(4, 13)), (9, 8, 7, 6), (3,) * 17, (1, 2, 3, 4, 5)]
