"""Whether requests, samples, rows and pages of an engine agree."""

from collections.abc import Collection
from typing import NamedTuple

from paged_jax.engine.requests import Sample, SequenceId
from paged_jax.engine.scheduler import Scheduler
from paged_jax.host.report import AuditReport


class EngineAudit(NamedTuple):
  """Zero everywhere, and a clean manager, for a sound engine."""

  manager: AuditReport
  sequences: int  # of the engine in the manager that no sample has
  pages: int  # that they hold
  rows: int  # whose sample the engine, the sample and the manager do not agree about
  lost: int  # samples that have not ended, and are in no list: nothing will ever come of them
  late: int  # samples that have ended, and still wait or run

  @property
  def clean(self) -> bool:
    """Whether everything agrees."""
    return self.manager.clean and not any(self[1:])


def reconcile(
  scheduler: Scheduler, live: Collection[Sample], coming: Collection[Sample]
) -> EngineAudit:
  """What is wrong.

  Args:
    scheduler: With its queue and its manager.
    live: Samples that have not ended.
    coming: Those of them that the next round looks at.
  """
  running, waiting = scheduler.queue.running, scheduler.queue.waiting
  ended = scheduler.ended
  holders = {*running.values(), *waiting, *ended}
  holders |= {beam for sample in holders for beam in sample.beams}
  held = {id(sample.handle) for sample in holders}
  manager = scheduler.manager
  ours = [x for x in manager.list_handles() if isinstance(x.request_id, SequenceId)]
  orphans = [handle for handle in ours if id(handle) not in held]
  astray = [row for row, sample in running.items() if not _sits(sample, row)]
  astray += [x.row for x in holders if x.row >= 0 and running.get(x.row) is not x]
  return EngineAudit(
    manager=manager.audit(),
    sequences=len(orphans),
    pages=sum(handle.stats().num_pages for handle in orphans),
    rows=len(astray),
    lost=sum(sample not in holders and sample not in coming for sample in live),
    late=sum(x.completion is not None and x not in ended and x not in coming for x in holders),
  )


def _sits(sample: Sample, row: int) -> bool:
  """Whether a sample, and the manager, know of the sample's row."""
  return sample.row == row and sample.handle is not None and sample.handle.row == row
