"""Fork, commit and rollback: each branch reads as if it had been asked for alone."""

import dataclasses
import functools
import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import PROMPTS, Words, engine, finish, force_preemption

from paged_jax.engine import Sampling

MOST = 16
WORDS = Words()


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


class Orders:
  """Commands in any order, and what should come of them: pieces of text, each drawn with a seed from
  where it begins."""

  def __init__(self, data):
    self.data, self.seeds = data, itertools.count(1000, 10)
    self.e = engine(
      num_steps=data.draw(st.sampled_from([1, 4])),
      num_pages=data.draw(st.sampled_from([8, 12, 40])),
      preemption=data.draw(st.sampled_from(["swap", "recompute"])),
      options=dict(prefix_cache=data.draw(st.booleans())),
    )
    self.expected = {}  # by handle and sample: prompt, certain text, seed of the rest, "" or an end
    self.children = {}  # branches that can be committed, by what they were forked from
    self.submit()

  def one(self, of=None):
    return self.data.draw(st.sampled_from(list(of or self.expected)))

  def text(self, which):
    handle, nth = which
    return handle.tokens[nth]

  def submit(self):
    prompt, seed = self.data.draw(st.sampled_from(PROMPTS[:4])), next(self.seeds)
    count = self.data.draw(st.sampled_from([1, 1, 2]))
    wanted = dataclasses.replace(hot(seed), num_samples=count)
    handle = self.e.submit(prompt, wanted)
    for nth in range(count):
      self.expected[handle, nth] = (prompt, [], seed + nth, "")

  def listen(self):
    """A request whose listener asks for others, and cancels them at once or rolls them back."""
    prompt, seed, cancels = PROMPTS[0], next(self.seeds), self.data.draw(st.booleans())
    asked = []

    def on_token(nth, tokens, logprobs):
      if asked:
        return
      other = self.e.submit(PROMPTS[1], hot(seed + 1))
      asked.append(other)
      if cancels:
        other.cancel()
      else:
        other.rollback(0, hot(seed + 2))
      end, begun = ("cancelled", None) if cancels else ("", seed + 2)
      self.expected[other, 0] = (PROMPTS[1], [], begun, end)

    handle = self.e.submit(prompt, hot(seed), on_token=on_token)
    self.expected[handle, 0] = (prompt, [], seed, "")

  def step(self):
    self.e.step()

  def preempt(self):
    force_preemption(self.e)

  def fork(self):
    which, seed = self.one(), next(self.seeds)
    (handle, nth), text = which, self.text(which)
    if len(text) == MOST:
      return
    prompt = self.expected[which][0]
    branches = handle.fork(2, hot(seed), sample=nth)
    for i, branch in enumerate(branches):
      self.expected[branch, 0] = (prompt, text, seed + i, "")
    self.expected[which] = (prompt, text, None, "rests")
    self.children.setdefault(which, []).extend((branch, 0) for branch in branches)

  def rollback(self):
    which, seed = self.one(), next(self.seeds)
    (handle, nth), text = which, self.text(which)
    kept = self.data.draw(st.integers(0, min(len(text), MOST - 1)))
    handle.rollback(kept, hot(seed), sample=nth)
    assert self.text(which) == text[:kept] and not handle.completions[nth]
    self.expected[which] = (self.expected[which][0], text[:kept], seed + nth, "")

  def commit(self):
    parents = [each for each in self.children if self.children[each]]
    if not parents:
      return
    parent = self.one(parents)
    branch = self.one(self.children[parent])
    text, seed = self.text(branch), next(self.seeds)
    branch[0].commit()
    assert self.text(parent) == text
    for each in self.children.pop(parent):
      if not each[0].done:
        self.expected[each] = (self.expected[each][0], self.text(each), None, "cancelled")
    with pytest.raises(ValueError, match="has been committed already"):
      branch[0].commit()
    handle, nth = parent
    self.expected[parent] = (self.expected[parent][0], text, None, "length")
    if len(text) < MOST:
      handle.rollback(len(text), hot(seed), sample=nth)  # with a seed that we know
      self.expected[parent] = (self.expected[parent][0], text, seed + nth, "")

  def cancel(self):
    handle, _ = self.one()
    for nth, completion in enumerate(handle.completions):
      which = (handle, nth)
      if completion is None and self.expected[which][3] != "length":  # then it is too late
        self.expected[which] = (self.expected[which][0], self.text(which), None, "cancelled")
    handle.cancel()

  def check(self):
    """Everything has come to an end, or rests; then all of it is given back."""
    for _ in range(400):
      if not self.e.step():
        break
    else:
      raise AssertionError("it never stops")
    assert self.e.audit().clean, self.e.audit()
    for (handle, nth), (prompt, text, seed, end) in self.expected.items():
      completion = handle.completions[nth]
      if end == "rests":
        assert completion is None and handle.tokens[nth] == text
        handle.cancel()
        continue
      assert completion is not None and completion.error is None
      assert completion.reason == (end or "length")
      rest = alone((*prompt, *text), seed, MOST - len(text)) if not end and len(text) < MOST else []
      assert completion.tokens == [*text, *rest]
    finish(self.e)
    assert self.e.manager.num_free_rows == self.e.config.cache.num_rows


COMMANDS = [
  Orders.submit, Orders.fork, Orders.rollback, Orders.commit, Orders.cancel, Orders.preempt,
  Orders.listen,
]  # fmt: skip


def any_orders(data):
  orders = Orders(data)
  for command in data.draw(st.lists(st.sampled_from([*COMMANDS, *[Orders.step] * 6]), max_size=14)):
    command(orders)
  orders.check()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_orders_read_as_their_pieces_alone_and_leave_nothing(data):
  any_orders(data)


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_orders_for_ten_minutes():
  until = time.monotonic() + 600

  @settings(max_examples=100, deadline=None, database=None)
  @given(st.data())
  def run(data):
    any_orders(data)

  while time.monotonic() < until:
    run()


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


def test_a_request_of_several_samples_is_forked_sample_by_sample():
  e = engine(num_steps=1)
  handle = e.submit(PROMPTS[0], dataclasses.replace(hot(3), num_samples=2))
  steps(e, handle, 5)
  text = handle.tokens[1]
  with pytest.raises(ValueError, match="the request has 2 samples: say which with `sample`"):
    handle.fork(2)
  with pytest.raises(ValueError, match=r"sample must be in \[0, 2\), got 2"):
    handle.rollback(0, sample=2)
  first, second = handle.fork(2, sample=1)  # as sample 1 does: with seeds 4 and 5
  while e.step():
    pass
  assert handle.tokens == [alone(PROMPTS[0], 3, MOST), text]
  assert first.tokens == [alone(PROMPTS[0], 4, MOST)]
  assert second.tokens == [[*text, *alone((*PROMPTS[0], *text), 5, MOST - len(text))]]
  second.commit()
  finish(e)
  assert handle.tokens[1] == second.tokens[0] and handle.done


def test_commit_then_fork_without_a_step_begins_with_what_was_committed():
  e = engine(num_steps=1)
  handle = e.submit(PROMPTS[0], hot(0))
  steps(e, handle, 3)
  _, chosen = handle.fork(2, hot(10))
  steps(e, chosen, 6)
  text = chosen.tokens[0]
  chosen.commit()
  (branch,) = handle.fork(1, hot(20))
  assert handle.tokens == [text] == branch.tokens
  while e.step():
    pass
  assert branch.tokens == [[*text, *alone((*PROMPTS[0], *text), 20, MOST - len(text))]]
  assert handle.tokens == [text] and not handle.done  # it rests
  handle.cancel()
  finish(e)


def test_pieces_follow_commands():
  e = engine(num_steps=1)
  handle = e.submit(PROMPTS[0], hot(0))
  steps(e, handle, 5)
  text = handle.tokens[0]
  (branch,) = handle.fork(1, hot(7))
  assert "".join(handle.pieces()) == "".join(branch.pieces()) == WORDS.decode(text)
  steps(e, branch, 9)
  assert "".join(handle.pieces()) == WORDS.decode(text)
  chosen = branch.tokens[0]
  branch.commit()
  assert "".join(handle.pieces()) == WORDS.decode(chosen)
  handle.rollback(3)
  assert "".join(handle.pieces()) == WORDS.decode(chosen[:3])
  finish(e)
  assert "".join(handle.pieces()) == handle.completions[0].text == WORDS.decode(handle.tokens[0])


def test_stops_count_from_where_a_branch_begins():
  e = engine(num_steps=1)
  handle = e.submit(PROMPTS[0], hot(0))
  steps(e, handle, 6)
  text = handle.tokens[0]
  stop = WORDS.decode(text[2:3])
  wanted = dataclasses.replace(hot(7), stop=(stop,))
  (branch,) = handle.fork(1, wanted)
  handle.cancel()
  finish(e)
  rest = alone((*PROMPTS[0], *text), 7, MOST - len(text))
  if text[2] in rest:
    rest = rest[: rest.index(text[2]) + 1]
  assert branch.tokens == [[*text, *rest]] and branch.completions[0].text.startswith(
    WORDS.decode(text)
  )


def test_a_branch_that_stopped_stops_what_it_is_committed_to():
  for step_between in (False, True):
    e = engine(num_steps=1)
    handle = e.submit(PROMPTS[0], hot(0))
    steps(e, handle, 3)
    (child,) = handle.fork(1, hot(1))
    steps(e, child, 5)
    text = child.tokens[0]
    rest = alone((*PROMPTS[0], *text), 2, MOST - len(text))
    (grandchild,) = child.fork(1, dataclasses.replace(hot(2), stop=(WORDS.decode(rest[1:3]),)))
    while not grandchild.done:
      e.step()
    grandchild.commit()
    if step_between:
      e.step()
    child.commit()
    handle.cancel()  # it has ended by then
    finish(e)
    (done,) = handle.completions
    assert (done.reason, done.tokens, done.text) == (
      "stop", [*text, *rest[:3]], WORDS.decode([*text, *rest[:1]])
    )  # fmt: skip


def test_a_seed_that_another_sample_of_the_request_cannot_have_is_refused():
  e = engine()
  handle = e.submit(PROMPTS[0], dataclasses.replace(hot(0), num_samples=2))
  with pytest.raises(ValueError, match="seed is out of range for sample 1: 4294967295"):
    handle.rollback(0, hot(2**32 - 1), sample=1)
  handle.rollback(0, hot(2**32 - 2), sample=1)
  finish(e)


def test_a_command_after_the_end_of_the_engine_is_refused():
  e = engine()
  handle = e.submit(PROMPTS[0], hot(0))
  e.step()
  e.close()
  for command in (
    lambda: handle.fork(1),
    lambda: handle.rollback(0),
    lambda: e.submit([1], hot(0)),
  ):
    with pytest.raises(RuntimeError, match="the engine is closed"):
      command()
  handle.cancel()
  assert handle.completions[0].error == "the engine was closed"


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
