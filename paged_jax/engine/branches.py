"""Branches of a running request: fork, commit and rollback, for rollouts and tree search.

A branch begins on the pages of the request that it was forked from; nothing is copied before one of
them writes.

    # request      [prompt | a b c] rests
    # branch 0     [prompt | a b c | d e ...
    # branch 1     [prompt | a b c | f ...      commit: the request goes on with "a b c f ..."

A command changes at once what a sample is to be (`Change`), and each command sees what those before
it have made. Only the outcome is carried out, by the next round, after all reports are read (`apply`).
"""

import dataclasses
from collections.abc import Iterator, Sequence

from paged_jax.engine.requests import Change, Request, Sample
from paged_jax.engine.sampling import Sampling
from paged_jax.engine.scheduler import Scheduler


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


def fork(sample: Sample, samplings: Sequence[Sampling], numbers: Iterator[int]) -> list[Request]:
  """Branches that begin as `sample` is to be; it rests."""
  sample.ask(resting=True, reason=None)
  now, made = sample.change or sample, []
  for sampling in samplings:
    request = dataclasses.replace(sample.request, samples=[], on_token=None, parent=sample)
    own = (list(now.tokens), list(now.logprobs))
    request.samples.append(Sample(next(numbers), 0, request, sampling, *own, origin=sample))
    made.append(request)
  sample.branches.extend(made)
  return made


def roll_back(sample: Sample, num_tokens: int, sampling: Sampling) -> None:
  """A sample goes on from its first `num_tokens` new tokens, even if it had ended or rested."""
  now = sample.change or sample
  sample.ask(
    resting=False, reason=None, sampling=sampling, reader=None,
    tokens=now.tokens[:num_tokens], logprobs=now.logprobs[:num_tokens],
  )  # fmt: skip


def commit(branch: Request, parent: Sample) -> list[Sample]:
  """The parent goes on as the branch, on its pages; returns the samples that change."""
  (source,) = branch.samples
  chosen, stopped = source.change or source, ending(source) == "stop"
  full = len(chosen.tokens) >= (parent.change or parent).sampling.max_new_tokens
  parent.ask(
    tokens=list(chosen.tokens), logprobs=list(chosen.logprobs),
    reader=chosen.reader if stopped else None,
    source=source.change.source if source.change else source,
    resting=False, reason="stop" if stopped else "length" if full else None,
  )  # fmt: skip
  ended = cancel([request.samples[0] for request in parent.branches])
  if source.change is not None:
    source.ask(source=None)  # the parent has it
  parent.branches.clear()
  return [parent, *ended]


def cancel(samples: Sequence[Sample]) -> list[Sample]:
  """Those of `samples` that have not ended do so; returns them."""
  going = [sample for sample in samples if ending(sample) is None]
  for sample in going:
    sample.ask(reason="cancelled")
  return going


def apply(scheduler: Scheduler, changed: Sequence[tuple[Sample, Change]]) -> None:
  """Gives samples what they hold now that they have become what commands said.

  # before   parent ─ row 3     branch ─ row 5     sibling ─ row 6     commit of the branch
  # after    parent ─ row 5     branch ends        sibling ─ row 6, ends      row 3 is given back
  """
  holders = [holder for sample, now in changed for holder in (sample, now.source) if holder]
  bodies = {holder: scheduler.detach(holder) for holder in dict.fromkeys(holders)}
  unused = []
  for sample, now in changed:
    body = bodies.pop(now.source, None) if now.source else None
    unused.append(scheduler.attach(sample, body, ends=now.reason is not None))
  scheduler.give_back([*unused, *bodies.values()])
