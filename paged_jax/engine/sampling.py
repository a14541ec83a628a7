"""What a request asks for: how to go on from its prompt."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

MAX_BIASES = 16
MAX_STOP_TOKENS = 8
_HUGE = 1e30  # what float32 can still multiply and divide by


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to go on from a prompt. Equal seeds give equal texts, whatever runs beside them.

  Sample i of a request draws as the only sample of a request with seed + i would. With `num_beams`
  nothing is drawn: the request's samples are the texts that beam search ends with, best first.

  >>> from paged_jax.engine import Sampling
  >>> Sampling(temperature=0.8, top_p=0.95, seed=7).num_samples
  1

  Raises:
    ValueError: A field is out of range; the message names the field and its value.
  """

  max_new_tokens: int = 64
  num_samples: int = 1
  temperature: float = 0.0  # 0 = the most likely token
  top_k: int | None = None  # the most likely tokens only; None = all
  top_p: float = 1.0  # the smallest set of likely tokens with this mass; 1 = all
  min_p: float = 0.0  # tokens at least this likely, relative to the most likely one
  repetition_penalty: float = 1.0  # divides what favours a token that has been seen
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  seed: int = 0
  stop_tokens: tuple[int, ...] = ()  # besides the engine's own
  stop: tuple[str, ...] = ()  # texts that end a sample, and are not part of it
  num_beams: int = 1  # texts that a beam search keeps at every step; 1 = no search
  length_penalty: float = 1.0  # found texts are ranked by log-probability / length ** this
  logprobs: str | None = None  # of drawn tokens: "model", under its own distribution; None: NaN

  def __post_init__(self):
    limits = {
      "max_new_tokens": _whole(self.max_new_tokens) and self.max_new_tokens >= 1,
      "num_samples": _whole(self.num_samples) and self.num_samples >= 1,
      "temperature": _number(self.temperature) and 0 <= self.temperature <= _HUGE,
      "top_k": self.top_k is None or (_whole(self.top_k) and self.top_k >= 1),
      "top_p": _number(self.top_p) and 0 < self.top_p <= 1,
      "min_p": _number(self.min_p) and 0 <= self.min_p <= 1,
      "repetition_penalty": _number(self.repetition_penalty)
      and 1 / _HUGE <= self.repetition_penalty <= _HUGE,
      "logit_bias": isinstance(self.logit_bias, Mapping)
      and len(self.logit_bias) <= MAX_BIASES
      and all(
        _whole(t) and t >= 0 and _number(x) and (abs(x) <= _HUGE or x == -math.inf)
        for t, x in self.logit_bias.items()
      ),
      "seed": _whole(self.seed) and 0 <= self.seed < 2**32,
      "logprobs": self.logprobs in (None, "model"),
      "stop_tokens": isinstance(self.stop_tokens, Sequence)
      and len(self.stop_tokens) <= MAX_STOP_TOKENS
      and all(map(_whole, self.stop_tokens)),
      "stop": isinstance(self.stop, Sequence)
      and not isinstance(self.stop, str)
      and all(isinstance(text, str) and text for text in self.stop),
      "num_beams": _whole(self.num_beams) and self.num_beams >= 1,
      "length_penalty": _number(self.length_penalty) and abs(self.length_penalty) <= 16,
    }
    for name, ok in limits.items():
      if not ok:
        raise ValueError(f"{name} is out of range: {getattr(self, name)!r}")
    if self.seed + self.width > 2**32:
      raise ValueError(f"seed is out of range for {self.width} samples: {self.seed}")
    if self.num_beams > 1 and (self.temperature or self.num_samples > 1 or self.stop):
      raise ValueError(
        f"num_beams={self.num_beams} goes with no temperature ({self.temperature}), one sample"
        f" ({self.num_samples}) and no stop ({self.stop!r})"
      )

  @property
  def width(self) -> int:
    """Texts that the request ends with."""
    return max(self.num_samples, self.num_beams)


def _whole(value) -> bool:
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _number(value) -> bool:
  return _whole(value) or (isinstance(value, (float, np.floating)) and not math.isnan(value))
