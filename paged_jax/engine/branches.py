"""Branches of a running request: fork, commit and rollback, for rollouts and tree search.

A branch begins on the pages of the request that it was forked from; nothing is copied before one of
them writes. These functions run between calls, when all reports have been read.

    # request      [prompt | a b c] rests
    # branch 0     [prompt | a b c | d e ...
    # branch 1     [prompt | a b c | f ...      commit: the request goes on with "a b c f ..."
"""

import dataclasses
from collections.abc import Iterator, Sequence

from paged_jax.engine.queue import Entry, Sample
from paged_jax.engine.sampling import Sampling
from paged_jax.engine.scheduler import Scheduler


def seeds(sampling: Sampling, count: int) -> list[Sampling]:
  """`count` copies of `sampling`, each with a seed of its own from that of `sampling` on."""
  return [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(count)]


def make(
  parent: Entry, num_tokens: int, samplings: Sequence[Sampling], numbers: Iterator[int]
) -> list[Entry]:
  """Branches that share the parent's prompt and first `num_tokens` new tokens."""
  (origin,) = parent.samples
  entries = []
  tokens, logprobs = origin.tokens[:num_tokens], origin.logprobs[:num_tokens]
  for sampling in samplings:
    entry = dataclasses.replace(parent, samples=[], branches=[], on_token=None, parent=parent)
    own = (list(tokens), list(logprobs))
    entry.samples.append(Sample(next(numbers), 0, entry, sampling, *own, origin=origin))
    entries.append(entry)
  parent.branches += entries
  return entries


def fork(scheduler: Scheduler, parent: Entry, num_tokens: int, entries: list[Entry]) -> None:
  """The branches come to wait; the parent rests where they begin."""
  (origin,) = parent.samples
  roll_back(scheduler, origin, num_tokens, None)
  origin.resting = True
  if origin.row >= 0:
    scheduler.calls.changed[origin.row] = origin
  scheduler.queue.add([entry.samples[0] for entry in entries])


def roll_back(
  scheduler: Scheduler, sample: Sample, num_tokens: int, sampling: Sampling | None
) -> None:
  """A sample goes on from its first `num_tokens` new tokens, even if it had ended or rested."""
  sample.completion, sample.resting = None, False
  sample.sampling = sampling or sample.sampling
  del sample.tokens[num_tokens:], sample.logprobs[num_tokens:]
  sample.told = min(sample.told, num_tokens)
  scheduler.ended = [each for each in scheduler.ended if each is not sample]
  if sample.row >= 0 and sample.decoding and sample.handle is not None:
    if sample.handle.num_tokens >= sample.length:
      scheduler.manager.trim(sample.handle, sample.length - 1)
    scheduler.calls.changed[sample.row] = sample
  else:
    _release(scheduler, sample)
    scheduler.queue.add([sample])


def commit(scheduler: Scheduler, branch: Entry) -> list[Sample]:
  """The parent goes on as the branch, on its pages; returns the samples that end."""
  parent = branch.parent
  assert parent is not None
  (to,), (source,) = parent.samples, branch.samples
  _release(scheduler, to)
  scheduler.ended = [each for each in scheduler.ended if each not in (to, source)]
  waits = source in scheduler.queue.waiting or source.handle is None
  scheduler.queue.remove(source)
  to.take_over(source)
  to.resting = False
  stopped = source.completion is not None and source.completion.reason == "stop"
  to.completion = source.completion if stopped else None
  if to.row >= 0:
    scheduler.queue.running[to.row] = to
    scheduler.calls.changed[to.row] = to
  ended = [entry.samples[0] for entry in parent.branches if not entry.done]
  parent.branches.clear()
  if to.completion is not None or to.remaining < 1:
    ended.append(to)
  elif waits:
    scheduler.queue.add([to])
  return ended


def _release(scheduler: Scheduler, sample: Sample) -> None:
  """A sample holds nothing, and waits no more."""
  if sample.row >= 0:
    scheduler.withdraw(sample)
  if sample.handle is not None:
    scheduler.forget(sample)
  scheduler.queue.remove(sample)
