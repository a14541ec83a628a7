"""Branches of a running request: fork, commit and rollback, for rollouts and tree search.

A branch begins on the pages of the request that it was forked from; nothing is copied before one of
them writes.

    # request      [prompt | a b c] rests
    # branch 0     [prompt | a b c | d e ...
    # branch 1     [prompt | a b c | f ...      commit: the request goes on with "a b c f ..."

A command changes what a sample is to be, at once; each sees what those before it have made. Only the
outcome is carried out, by the next round, when all reports have been read (`apply`).
"""

import dataclasses
from collections.abc import Iterator, Sequence

from paged_jax.engine.requests import Change, Entry, Sample
from paged_jax.engine.sampling import Sampling
from paged_jax.engine.scheduler import Scheduler


def change(sample: Sample) -> Change:
  """What a sample is to be; so far what it is."""
  if sample.change is None:
    sample.change = Change(
      list(sample.tokens), list(sample.logprobs), sample.sampling, sample.resting, source=sample,
      reader=sample.reader,
    )  # fmt: skip
  return sample.change


def ending(sample: Sample) -> str | None:
  """Why a sample has ended, or is to; None if it goes on."""
  if sample.change is not None:
    return sample.change.reason
  return None if sample.completion is None else sample.completion.reason


def alone(sample: Sample) -> Sampling:
  """How a sample draws, as the only one of its request."""
  sampling = (sample.change or sample).sampling
  return dataclasses.replace(sampling, num_samples=1, seed=sampling.seed + sample.nth)


def seeds(sampling: Sampling, count: int) -> list[Sampling]:
  """`count` copies of `sampling`, each with a seed of its own from that of `sampling` on."""
  return [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(count)]


def fork(sample: Sample, samplings: Sequence[Sampling], numbers: Iterator[int]) -> list[Entry]:
  """Branches that begin as `sample` is to be; it rests."""
  now = change(sample)
  now.resting, now.reason = True, None
  entries = []
  for sampling in samplings:
    entry = dataclasses.replace(sample.entry, samples=[], on_token=None, parent=sample)
    own = (list(now.tokens), list(now.logprobs))
    entry.samples.append(Sample(next(numbers), 0, entry, sampling, *own, origin=sample))
    entries.append(entry)
  sample.branches += entries
  return entries


def roll_back(sample: Sample, num_tokens: int, sampling: Sampling) -> None:
  """A sample goes on from its first `num_tokens` new tokens, even if it had ended or rested."""
  now = change(sample)
  now.resting, now.reason, now.sampling, now.reader = False, None, sampling, None
  del now.tokens[num_tokens:], now.logprobs[num_tokens:]


def commit(branch: Entry, parent: Sample) -> list[Sample]:
  """The parent goes on as the branch, on its pages; returns the samples that change."""
  (source,) = branch.samples
  now, chosen = change(parent), source.change or source
  stopped = ending(source) == "stop"
  now.tokens, now.logprobs = list(chosen.tokens), list(chosen.logprobs)
  now.reader = chosen.reader if stopped else None
  now.source = source.change.source if source.change else source
  full = len(now.tokens) >= now.sampling.max_new_tokens
  now.resting, now.reason = False, "stop" if stopped else "length" if full else None
  ended = cancel([entry.samples[0] for entry in parent.branches])
  if source.change is not None:
    source.change.source = None  # the parent has it
  parent.branches.clear()
  return [parent, *ended]


def cancel(samples: Sequence[Sample]) -> list[Sample]:
  """Those of `samples` that have not ended do so; returns them."""
  going = [sample for sample in samples if ending(sample) is None]
  for sample in going:
    change(sample).reason = "cancelled"
  return going


def apply(scheduler: Scheduler, changed: Sequence[tuple[Sample, Change]]) -> None:
  """Gives samples what they hold now that they have become what commands said.

  # before   parent ─ row 3     branch ─ row 5     sibling ─ row 6     commit of the branch
  # after    parent ─ row 5     branch ends        sibling ─ row 6, ends      row 3 is given back
  """
  holders = [holder for sample, now in changed for holder in (sample, now.source) if holder]
  bodies = {holder: scheduler.detach(holder) for holder in dict.fromkeys(holders)}
  for sample, now in changed:
    body = bodies.pop(now.source, None) if now.source else None
    scheduler.attach(sample, body, ends=now.reason is not None)
  scheduler.give_back(list(bodies.values()))
