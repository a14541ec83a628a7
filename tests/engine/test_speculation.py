"""Speculative decoding: the text is that of plain decoding, in fewer passes."""

import dataclasses

import jax.numpy as jnp
import pytest
import tiny
from serving import PROMPTS, engine, finish

from paged_jax.engine import PromptLookup, Sampling


@dataclasses.dataclass(frozen=True)
class Stubborn:
  """Drafts one token for ever."""

  num_drafts: int
  token: int

  def __call__(self, texts, lengths):
    return jnp.full((texts.shape[0], self.num_drafts), self.token, jnp.int32)


@pytest.mark.parametrize("drafter, num_steps", [(PromptLookup(3), 4), (Stubborn(2, 3), 1)])
@pytest.mark.parametrize("num_pages", [9, 24])
def test_text_is_that_of_plain_decoding(drafter, num_steps, num_pages):
  e = engine(drafter=drafter, num_steps=num_steps, num_pages=num_pages)
  got = e.generate(PROMPTS, Sampling(max_new_tokens=12))
  assert [c[0].tokens for c in got] == [tiny.greedy(p, 12) for p in PROMPTS]
  finish(e)


def test_drawn_text_and_its_logprobs_are_those_of_plain_decoding():
  hot = [
    Sampling(
      max_new_tokens=14, temperature=1.5, repetition_penalty=1.3, seed=i, top_k=9, logprobs="model"
    )
    for i in range(len(PROMPTS))
  ]
  plain = engine().generate(PROMPTS, hot)
  for got, want in zip(engine(drafter=PromptLookup(3)).generate(PROMPTS, hot), plain):
    assert got[0].tokens == want[0].tokens
    assert got[0].logprobs == pytest.approx(want[0].logprobs, abs=1e-4)


def test_stops_are_found_among_accepted_drafts():
  text = tiny.greedy(PROMPTS[4], 24)
  for stop in {*text[6:]}:
    wanted = Sampling(max_new_tokens=24, stop_tokens=(stop,))
    (done,) = engine(drafter=PromptLookup(3)).generate([PROMPTS[4]], wanted)[0]
    assert done.tokens == text[: text.index(stop) + 1]


def test_repetition_is_drawn_in_fewer_steps():
  prompt, calls, texts = (3,) * 17, {}, []
  for drafter in (None, PromptLookup(3)):
    e = engine(model=tiny.model(0), drafter=drafter, num_steps=1)  # comes to repeat itself
    texts.append(e.generate([prompt], Sampling(max_new_tokens=28))[0][0].tokens)
    calls[drafter] = e.counts.calls
    finish(e)
  assert texts[0] == texts[1]
  assert len({*texts[0][-12:]}) < 6
  assert calls[PromptLookup(3)] < 0.7 * calls[None]
