"""Sampling: each rule by hand, and through an engine where the text so far matters."""

import numpy as np
import pytest
import tiny
from serving import PROMPTS, engine, finish, force_preemption

from paged_jax.engine import EngineConfig, PromptLookup, Sampling


@pytest.mark.parametrize(
  "fields",
  [dict(temperature=3e38), dict(temperature=1e300), dict(repetition_penalty=1e-40),
   dict(logit_bias={1: 3.5e38}), dict(logit_bias={1: -1e31})],
)  # fmt: skip
def test_what_float32_cannot_compute_with_is_refused(fields):
  (name,) = fields
  with pytest.raises(ValueError, match=f"{name} is out of range"):
    Sampling(**fields)
  Sampling(logit_bias={1: -np.inf}, temperature=1e30, repetition_penalty=1e-30)


def penalised(prompt, count, penalty=3.0):
  """New tokens under a repetition penalty, one at a time, each from the whole text."""
  text = list(prompt)
  for _ in range(count):
    padded = np.zeros(tiny.LONGEST, np.int32)
    padded[: len(text)] = text
    logits = np.array(tiny._dense(tiny.MODEL, padded)[len(text) - 1])
    for token in set(text):
      logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    text.append(int(np.argmax(logits)))
  return text[len(prompt) :]


def test_seen_tokens_of_prompt_and_text_are_penalised():
  """Also those of the prompt, and after the row had another request."""
  e, wanted = engine(), Sampling(max_new_tokens=10, repetition_penalty=3.0, logprobs="model")
  for prompt in ((1, 2, 3), (5, 6), (27, 22, 6)):
    (done,) = e.generate([prompt], wanted)[0]
    assert done.tokens == penalised(prompt, 10)
    assert done.tokens != tiny.greedy(prompt, 10)
    assert len(done.logprobs) == 10 and max(done.logprobs) <= 0


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("drafter", [None, PromptLookup(3)])
def test_requests_that_change_logits_come_and_go_beside_plain_ones(preemption, drafter):
  """Programs with and without `seen` take turns; a row that needs it has it after each change."""
  e = engine(preemption=preemption, drafter=drafter)
  plain = e.submit(PROMPTS[0], Sampling(max_new_tokens=40))
  e.step()
  for nth, prompt in enumerate(PROMPTS[1:]):
    other = e.submit(prompt, Sampling(max_new_tokens=14, repetition_penalty=3.0))
    e.step()
    e.step()
    if nth % 2:
      force_preemption(e)
    elif len(other.tokens[0]) < 14:
      (branch,) = other.fork(1)
      while not branch.done:
        e.step()
      assert branch.tokens == [penalised(prompt, 14)]
      other.rollback(1)
    while not other.done:
      e.step()
    assert other.tokens == [penalised(prompt, 14)]
    e.step()
  finish(e)
  assert plain.tokens == [tiny.greedy(PROMPTS[0], 40)]


def test_only_programs_of_requests_that_ask_have_logprobs_and_only_these_get_them():
  e = engine()
  plain = e.submit(PROMPTS[0], Sampling(max_new_tokens=40, temperature=1.0, top_k=3))
  asked, reported = None, []
  while e.step():
    if len(e._calls):
      reported.append(bool(e._calls._calls[-1].like.logprobs.size))
    if len(plain.tokens[0]) > 8 and asked is None:
      asked = e.submit(PROMPTS[1], Sampling(max_new_tokens=8, logprobs="model"))
  assert (
    asked is not None
    and sorted({*reported}) == [False, True]
    and not reported[0]
    and not reported[-1]
  )
  assert np.isnan(plain.completions[0].logprobs).tolist() == [True] * 40
  assert np.isfinite(asked.completions[0].logprobs).tolist() == [True] * 8
  finish(e)


@pytest.mark.parametrize(
  "name, value",
  [
    ("max_new_tokens", 0), ("num_samples", 0), ("temperature", -1.0), ("temperature", float("nan")),
    ("top_k", 0), ("top_p", 0.0), ("min_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1),
    ("logit_bias", {1: float("nan")}), ("logit_bias", dict.fromkeys(range(17), 1.0)),
    ("logprobs", "sampled"), ("logprobs", True), ("stop_tokens", tuple(range(9))), ("stop", "text"), ("stop", ("",)), ("num_beams", 0), ("length_penalty", float("inf")),
  ],
)  # fmt: skip
def test_a_field_out_of_range_is_named(name, value):
  with pytest.raises(ValueError, match=f"^{name} is out of range"):
    Sampling(**{name: value})


@pytest.mark.parametrize(
  "fields, text",
  [
    (dict(eos=tuple(range(9))), "eos must be at most 8 tokens"),
    (dict(num_steps=0), "num_steps must be at least 1, got 0"),
    (dict(prompt_sizes=()), r"prompt_sizes must ascend, got \(\)"),
    (dict(prompt_sizes=(8, 4)), r"prompt_sizes must ascend, got \(8, 4\)"),
    (dict(prompt_sizes=(0, 4)), r"prompt_sizes must be positive, got \(0, 4\)"),
    (dict(preemption="hope"), "preemption must be one of .*, got 'hope'"),
    (dict(max_beams=5), r"max_beams must be in \[1, 4\], the number of rows, got 5"),
  ],
)
def test_an_engine_that_makes_no_sense_is_refused(fields, text):
  with pytest.raises(ValueError, match=f"^{text}"):
    EngineConfig(tiny.cache(), **fields)
