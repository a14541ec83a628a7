"""After `warm_up` nothing compiles. A test here forgets all programs, so it is the last one of the engine:
the others share theirs."""

import dataclasses

import jax
import pytest
from serving import PROMPTS, engine, finish, force_preemption

from paged_jax.engine import PromptLookup, Sampling


@pytest.mark.parametrize(
  "samplings, count",
  [([Sampling()], 3), ([Sampling(logprobs="model")], 3), ([Sampling(), Sampling(num_beams=2)], 6)],
)
def test_programs_that_no_request_needs_are_left_out(samplings, count, compiled):
  e, steps = engine(max_beams=4), []
  samplings = [dataclasses.replace(sampling, max_new_tokens=5) for sampling in samplings]
  e.warm_up(lambda done, total: steps.append((done, total)), samplings=samplings)
  assert steps == [(n, count) for n in range(count + 1)]
  compiled.clear()
  e.generate(PROMPTS[: len(samplings)], samplings)
  assert not compiled
  finish(e)


def test_nothing_compiles_after_warm_up(compiled):
  jax.clear_caches()  # nor is anything there already
  e, steps = engine(drafter=PromptLookup(3), max_beams=4), []
  e.warm_up(lambda done, total: steps.append((done, total)))
  assert steps == [(n, 6) for n in range(7)]
  assert compiled
  compiled.clear()
  kinds = [
    dict(), dict(temperature=0.5, repetition_penalty=1.2), dict(num_samples=3), dict(num_beams=2),
    dict(stop=("zz",), logit_bias={3: 1.0}), dict(),
  ]  # fmt: skip
  wanted = [Sampling(max_new_tokens=12, **fields) for fields in kinds]
  for _ in range(2):  # full hits the second time
    e.generate(PROMPTS, wanted)
  handle = e.submit(PROMPTS[2], wanted[1])
  while len(handle.tokens[0]) < 3:
    e.step()
  force_preemption(e)
  e.step()
  (branch,) = handle.fork(1)
  e.step()
  branch.commit()
  handle.rollback(2)
  while e.step():
    pass
  assert not compiled
  finish(e)
