"""Beam search of an engine against one by hand on the host."""

import pytest
import tiny
from serving import PROMPTS, engine, finish, force_preemption

from paged_jax.engine import Sampling


def check(completions, wanted):
  assert [c.tokens for c in completions] == [text for text, _ in wanted]
  assert [sum(c.logprobs) for c in completions] == pytest.approx([x for _, x in wanted], abs=1e-3)


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("num_pages", [16, 40])
def test_searches_find_what_they_find_alone(num_steps, num_pages):
  e = engine(max_beams=4, num_steps=num_steps, num_pages=num_pages)
  wanted = [Sampling(max_new_tokens=7, num_beams=1 + i % 4) for i in range(len(PROMPTS))]
  for prompt, each, got in zip(PROMPTS, wanted, e.generate(PROMPTS, wanted)):
    if each.num_beams == 1:
      assert got[0].tokens == tiny.greedy(prompt, 7)
    else:
      check(got, tiny.search(prompt, each.num_beams, 7))
  finish(e)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
def test_texts_that_end_keep_their_place_and_are_ranked(length_penalty):
  e = engine(max_beams=4)
  for prompt in PROMPTS[:3]:
    plain = tiny.search(prompt, 3, 8)
    stops = (plain[0][0][2], plain[1][0][4])
    wanted = Sampling(
      max_new_tokens=8, num_beams=3, stop_tokens=stops, length_penalty=length_penalty
    )
    (got,) = e.generate([prompt], wanted)
    check(got, tiny.search(prompt, 3, 8, stops, length_penalty))
    assert {c.reason for c in got} <= {"stop", "length"}
    assert any(c.reason == "stop" for c in got)
  finish(e)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_preempted_search_finds_the_same(preemption):
  for moment in range(1, 6):
    e = engine(max_beams=4, num_steps=1, preemption=preemption)
    handle = e.submit(PROMPTS[2], Sampling(max_new_tokens=6, num_beams=3))
    for _ in range(moment):
      e.step()
    force_preemption(e)
    finish(e)
    check(handle.completions, tiny.search(PROMPTS[2], 3, 6))


def test_a_cancelled_search_gives_everything_back():
  e = engine(max_beams=4)
  handle = e.submit(PROMPTS[2], Sampling(max_new_tokens=20, num_beams=3))
  e.step()
  e.step()
  handle.cancel()
  finish(e)
  assert [c.reason for c in handle.completions] == ["cancelled"] * 3


@pytest.mark.parametrize(
  "text, fields",
  [
    ("num_beams must be at most max_beams=4, got 5", dict(num_beams=5)),
    ("the request needs 48 pages, but there are 40", dict(num_beams=4, max_new_tokens=48)),
  ],
)
def test_impossible_searches_are_refused(text, fields):
  e = engine(max_beams=4)
  with pytest.raises(ValueError, match=text):
    e.submit((1,), Sampling(**(dict(max_new_tokens=4) | fields)))


@pytest.mark.parametrize("fields", [dict(temperature=1.0), dict(num_samples=2), dict(stop=("a",))])
def test_a_search_neither_draws_nor_stops_at_texts(fields):
  with pytest.raises(ValueError, match="num_beams=2 goes with"):
    Sampling(num_beams=2, **fields)
