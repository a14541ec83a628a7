"""Sampling: each rule by hand, and through an engine where the text so far matters."""

import numpy as np
import pytest
import tiny

from paged_jax.engine import Engine, EngineConfig, Sampling


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


def test_seen_tokens_of_prompt_and_text_are_penalised():
  """Also those of the prompt, and after the row had another request."""
  config = EngineConfig(tiny.cache(num_rows=2), tiny.options(), num_steps=3, prompt_sizes=(16,))
  e = Engine(tiny.MODEL, config)
  wanted = Sampling(max_new_tokens=10, repetition_penalty=3.0)
  for prompt in ((1, 2, 3), (5, 6), (27, 22, 6)):
    text = list(prompt)
    for _ in range(10):
      padded = np.zeros(tiny.LONGEST, np.int32)
      padded[: len(text)] = text
      logits = np.array(tiny._dense(tiny.MODEL, padded)[len(text) - 1])
      for token in set(text):
        logits[token] = logits[token] / 3 if logits[token] > 0 else logits[token] * 3
      text.append(int(np.argmax(logits)))
    (done,) = e.generate([prompt], wanted)[0]
    assert done.tokens == text[len(prompt) :]
    assert done.tokens != tiny.greedy(prompt, 10)
    assert len(done.logprobs) == 10 and max(done.logprobs) <= 0


@pytest.mark.parametrize(
  "name, value",
  [
    ("max_new_tokens", 0), ("num_samples", 0), ("temperature", -1.0), ("temperature", float("nan")),
    ("top_k", 0), ("top_p", 0.0), ("min_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1),
    ("logit_bias", {1: float("nan")}), ("logit_bias", dict.fromkeys(range(17), 1.0)),
    ("stop_tokens", tuple(range(9))), ("stop", "text"), ("stop", ("",)), ("num_beams", 0), ("length_penalty", float("inf")),
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
