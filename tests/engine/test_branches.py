"""Fork, commit and rollback: each branch reads as if it had been asked for alone."""

import contextlib
import functools

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import PROMPTS, engine, finish, force_preemption

from paged_jax.engine import Sampling

MOST = 16


def hot(seed, max_new_tokens=MOST):
  return Sampling(max_new_tokens=max_new_tokens, temperature=3.0, seed=seed)


@functools.cache
def alone(text, seed, count):
  """The next `count` tokens of a text, drawn with a seed."""
  e = engine(options=dict(prefix_cache=False))
  return e.generate([text], hot(seed, count))[0][0].tokens


def steps(e, handle, count):
  """Runs until a request has so many tokens."""
  while len(handle.tokens[0]) < count:
    assert e.step()


def test_branches_share_what_was_drawn_and_go_their_own_ways():
  e = engine(num_steps=1)
  handle = e.submit(PROMPTS[2], hot(0))
  steps(e, handle, 5)
  shared = handle.tokens[0]
  branches = handle.fork(3, hot(7))
  computed = e.counts.prompt_tokens
  while e.step():
    pass
  assert e.counts.prompt_tokens == computed  # nothing twice
  assert handle.tokens == [shared] and not handle.done  # it rests
  for seed, branch in enumerate(branches, start=7):
    rest = alone((*PROMPTS[2], *shared), seed, MOST - len(shared))
    assert branch.tokens == [[*shared, *rest]]
  handle.rollback(len(shared))  # and goes on
  while e.step():
    pass
  assert handle.tokens == [alone(PROMPTS[2], 0, MOST)]
  finish(e)


def test_commit_makes_a_branch_the_request():
  e = engine(num_steps=1)
  handle = e.submit(PROMPTS[0], hot(0))
  steps(e, handle, 4)
  branches = handle.fork(3, [hot(1), hot(2), hot(3)])
  steps(e, branches[1], 9)
  chosen = branches[1].tokens[0]
  branches[1].commit()
  while e.step():
    pass
  assert [b.completions[0].reason for b in branches] == ["cancelled"] * 3
  (text,) = handle.tokens
  assert text[: len(chosen)] == chosen
  assert text == [*chosen, *alone((*PROMPTS[0], *chosen), 0, MOST)[: MOST - len(chosen)]]
  assert handle.completions[0].reason == "length"
  finish(e)


def test_a_branch_that_has_ended_can_be_committed():
  e, told = engine(), []
  handle = e.submit(PROMPTS[0], hot(0), on_token=lambda nth, tokens, logprobs: told.extend(tokens))
  e.step()
  e.step()
  (branch,) = handle.fork(1, hot(5, 12))
  while e.step():
    pass
  assert branch.done
  branch.commit()
  while e.step():
    pass
  text = branch.tokens[0]
  assert handle.tokens == [[*text, *alone((*PROMPTS[0], *text), 0, MOST - 12)]]
  assert told == handle.tokens[0]
  finish(e)


def test_rollback_of_what_has_ended():
  e = engine()
  handle = e.submit(PROMPTS[3], hot(0))
  while e.step():
    pass
  text = handle.tokens[0]
  handle.rollback(6, hot(9))
  while e.step():
    pass
  assert handle.tokens == [[*text[:6], *alone((*PROMPTS[3], *text[:6]), 9, MOST - 6)]]
  handle.rollback(0, hot(0))
  finish(e)
  assert handle.tokens == [text]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_tree_reads_as_its_branches_alone(data):
  e = engine(
    num_steps=data.draw(st.sampled_from([1, 4])),
    num_pages=data.draw(st.sampled_from([8, 12, 40])),
    preemption=data.draw(st.sampled_from(["swap", "recompute"])),
    options=dict(prefix_cache=data.draw(st.booleans())),
  )
  prompt = data.draw(st.sampled_from(PROMPTS))
  # what each handle should read: pieces of text, each drawn with a seed from where it begins
  handles = [e.submit(prompt, hot(0))]
  origin = {0: ([], 0)}  # tokens it certainly begins with, and the seed of the rest
  for turn in range(data.draw(st.integers(1, 6))):
    for _ in range(data.draw(st.integers(0, 4))):
      e.step()
    which = data.draw(st.sampled_from(sorted(origin)))
    handle, text = handles[which], list(handles[which].tokens[0])
    what = data.draw(st.sampled_from(["fork", "rollback", "preempt", "cancel"]))
    if what == "fork" and len(text) < MOST and len(origin) < 6:
      for seed, branch in enumerate(handle.fork(2, hot(100 * turn + 1)), start=100 * turn + 1):
        origin[len(handles)] = (text, seed)
        handles.append(branch)
    elif what == "rollback" and len(text) > 1:
      kept = data.draw(st.integers(0, len(text) - 1))
      handle.rollback(kept, hot(1000 + turn))
      origin[which] = (text[:kept], 1000 + turn)
    elif what == "preempt":
      force_preemption(e)
    elif what == "cancel" and which:
      handle.cancel()
      origin[which] = None
  for which, handle in enumerate(handles):  # whoever rests goes on
    if origin[which] is not None and not handle.done:
      with contextlib.suppress(ValueError):  # it is at its end already
        handle.rollback(len(handle.tokens[0]))
  finish(e)
  for which, handle in enumerate(handles):
    if origin[which] is None:
      continue
    text, seed = origin[which]
    if len(text) == MOST:
      continue
    assert handle.tokens == [[*text, *alone((*prompt, *text), seed, MOST - len(text))]]


@pytest.mark.parametrize(
  "call, text",
  [
    (lambda h: h.fork(0), "count must be at least 1, got 0"),
    (lambda h: h.fork(2, [Sampling()]), "sampling must be one for each of 2 branches, got 1"),
    (lambda h: h.fork(1, Sampling(2, num_samples=2)), "sampling must be of one sample"),
    (lambda h: h.fork(1, Sampling(max_new_tokens=99)), "needs 101 tokens, but a row holds 48"),
    (lambda h: h.rollback(5), r"num_tokens must be in \[0, 0\], got 5"),
    (lambda h: h.rollback(-1), r"num_tokens must be in \[0, 0\], got -1"),
    (lambda h: h.commit(), "only a branch can be committed"),
  ],
)
def test_what_makes_no_sense_is_refused(call, text):
  e = engine()
  handle = e.submit(PROMPTS[0], hot(0))
  with pytest.raises(ValueError, match=text):
    call(handle)
  finish(e)
  assert handle.tokens == [alone(PROMPTS[0], 0, MOST)]


def test_a_request_of_several_samples_has_no_branches():
  e = engine()
  handle = e.submit(PROMPTS[0], Sampling(num_samples=2, max_new_tokens=3))
  with pytest.raises(ValueError, match="one sample has branches, this one has 2"):
    handle.fork(2)
  finish(e)
  assert handle.tokens == [tiny.greedy(PROMPTS[0], 3)] * 2


def test_those_who_rest_give_way_and_go_on_later():
  e = engine(num_pages=8, options=dict(prefix_cache=False))
  handle = e.submit(PROMPTS[2], hot(0))
  steps(e, handle, 6)
  shared = handle.tokens[0]
  (branch,) = handle.fork(1, hot(3))
  other = e.submit(PROMPTS[4], hot(4, 12))  # needs 7 of the 8 pages
  for _ in range(100):
    e.step()
  assert other.done and branch.done and not handle.done
  assert other.tokens == [alone(PROMPTS[4], 4, 12)]
  handle.rollback(len(shared))
  finish(e)
  assert handle.tokens == [alone(PROMPTS[2], 0, MOST)]
