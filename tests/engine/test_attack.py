"""Texts, pages and promises under attack."""

import asyncio

import pytest
import tiny
from serving import PROMPTS, engine, finish

from paged_jax.engine import Sampling


def alone(text, seed, count):
  """The next tokens of a text, drawn with a seed and nothing beside it."""
  e = engine(options=dict(prefix_cache=False))
  wanted = Sampling(max_new_tokens=count, temperature=2.0, seed=seed)
  return e.generate([text], wanted)[0][0].tokens


def hot(seed, count=14):
  return Sampling(max_new_tokens=count, temperature=2.0, seed=seed)


def run(e):
  """Runs what there is, but not for ever."""
  for _ in range(1000):
    if not e.step():
      return
  raise AssertionError("it never stops")


@pytest.mark.once
def test_a_request_that_ended_long_ago_goes_on_from_its_text():
  e = engine()
  handle = e.submit(PROMPTS[3], hot(0))
  run(e)
  text = handle.tokens[0]
  handle.rollback(6, hot(9))
  finish(e)
  assert handle.tokens == [[*text[:6], *alone((*PROMPTS[3], *text[:6]), 9, 8)]]


def test_a_request_goes_on_from_a_branch_that_ended_long_ago():
  e = engine()
  handle = e.submit(PROMPTS[0], hot(0))
  e.step()
  e.step()
  (branch,) = handle.fork(1, hot(5, 10))
  run(e)
  text = branch.tokens[0]
  branch.commit()
  finish(e)
  assert handle.tokens == [[*text, *alone((*PROMPTS[0], *text), 0, 4)]]


def test_a_listener_hears_of_each_token_once_when_its_request_is_cancelled():
  e, heard = engine(), []
  handle = e.submit(
    PROMPTS[0], Sampling(max_new_tokens=12), on_token=lambda n, tokens, _: heard.append(tokens)
  )
  e.step()
  e.step()
  handle.cancel()
  finish(e)
  assert handle.completions[0].reason == "cancelled"
  assert [token for tokens in heard for token in tokens] == handle.tokens[0]


def test_a_request_cancelled_right_after_it_forgot_all_its_tokens_stores_what_it_holds():
  e = engine()
  handle = e.submit(PROMPTS[2], hot(0))
  e.step()
  e.step()
  handle.rollback(0)
  handle.cancel()
  finish(e)
  assert handle.tokens == [[]]


def test_rows_that_others_hold_are_not_given_away():
  e = engine(num_pages=24)  # others hold two rows
  prompts = [(n, 1) for n in range(8)]
  handles = [e.submit(prompt, Sampling(max_new_tokens=4)) for prompt in prompts]
  finish(e)
  assert [handle.tokens[0] for handle in handles] == [tiny.greedy(p, 4) for p in prompts]


_ODD = (None, True, "x", float("nan"), float("inf"), (1,), {1: None}, object())


@pytest.mark.parametrize(
  "name, values",
  [
    ("max_new_tokens", _ODD),
    ("num_samples", _ODD),
    ("temperature", _ODD),
    ("top_k", _ODD[1:]),
    ("top_p", _ODD),
    ("min_p", _ODD),
    ("repetition_penalty", _ODD),
    ("logit_bias", (*_ODD, {1: float("inf")})),
    ("seed", _ODD),
    ("stop_tokens", (*_ODD[:3], {1})),
    ("stop", (*_ODD[:6], {1})),
    ("num_beams", _ODD),
    ("length_penalty", (*_ODD, 400.0, -400.0)),
  ],
)
def test_what_is_no_value_of_a_field_is_refused_by_its_name(name, values):
  for value in values:
    with pytest.raises(ValueError, match=name):
      Sampling(**{name: value})


def test_what_would_fail_in_a_round_is_refused_before():
  e = engine(max_beams=4)
  with pytest.raises(ValueError, match="seed"):
    Sampling(num_beams=3, seed=2**32 - 1)
  with pytest.raises(ValueError, match="priority"):
    e.submit(PROMPTS[0], priority="high")
  handle = e.submit(PROMPTS[0], Sampling(max_new_tokens=5, top_k=2**40))
  for _ in range(3):
    e.step()
  with pytest.raises(ValueError, match="num_tokens"):
    handle.rollback(1.5)
  with pytest.raises(ValueError, match="count"):
    handle.fork(1.5)
  finish(e)


def test_a_prompt_is_not_stored_with_the_logits_of_a_longer_text():
  e = engine()
  handle = e.submit(PROMPTS[2], hot(0))
  run(e)
  e.manager.clear_prefixes()
  handle.rollback(3)  # the prompt and three tokens are read again
  run(e)
  (done,) = e.generate([PROMPTS[2]], hot(0))[0]
  finish(e)
  assert done.tokens == alone(PROMPTS[2], 0, 14)


def test_a_prompt_with_a_single_new_token_is_cached_with_its_logits():
  e = engine()
  for _ in range(4):
    (done,) = e.generate([PROMPTS[2]], Sampling(max_new_tokens=1))[0]
    assert done.tokens == tiny.greedy(PROMPTS[2], 1)
  assert e.counts.cached_tokens == 3 * len(PROMPTS[2])
  finish(e)


@pytest.mark.once
def test_a_round_that_fails_ends_the_stream_of_a_search(monkeypatch):
  e = engine(max_beams=4)

  async def listen():
    async for _ in e.stream(PROMPTS[0], Sampling(max_new_tokens=12, num_beams=3)):
      pass

  rounds, pieces = iter(range(99)), e._scheduler.pieces

  def broken():
    if next(rounds) > 2:
      raise MemoryError("no more")
    return pieces()

  monkeypatch.setattr(e._scheduler, "pieces", broken)
  try:
    with pytest.raises(RuntimeError, match="no more"):
      asyncio.run(asyncio.wait_for(listen(), 90))
  finally:
    e.close()


def test_a_round_that_fails_ends_branches_that_were_just_asked_for(monkeypatch):
  e = engine()
  handle = e.submit(PROMPTS[0], hot(0))
  e.step()
  (branch,) = handle.fork(1)
  e._fail(MemoryError("no more"))
  assert handle.done and branch.done
