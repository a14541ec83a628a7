"""Which token comes next: what a request asks for, and the pure functions that draw it.

Axis letters: S rows, V vocabulary, W biased tokens per row, E stop tokens per row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value) -> bool:
  return _whole(value) or (isinstance(value, float | np.floating) and not math.isnan(value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """How each row draws."""

  temperature: jax.Array  # f32[S] 0 = the most likely token
  top_k: jax.Array  # i32[S] tokens to draw from
  top_p: jax.Array  # f32[S] mass to draw from, infinity = all
  min_p: jax.Array  # f32[S]
  penalty: jax.Array  # f32[S] 1 = none
  seeds: jax.Array  # u32[S]
  bias_tokens: jax.Array  # i32[S,W] V = none
  biases: jax.Array  # f32[S,W]


def draws(rows: Mapping[int, tuple[Sampling, int]], num_rows: int, vocab_size: int) -> Draws:
  """How each row draws, as NumPy arrays: row r as sample n of a request, for r: (sampling, n)."""
  s, w = num_rows, MAX_BIASES
  drawn: dict[str, Any] = dict(
    temperature=np.zeros(s, np.float32),
    top_k=np.full(s, np.iinfo(np.int32).max, np.int32),
    top_p=np.full(s, np.inf, np.float32),
    min_p=np.zeros(s, np.float32),
    penalty=np.ones(s, np.float32),
    seeds=np.zeros(s, np.uint32),
    bias_tokens=np.full((s, w), vocab_size, np.int32),
    biases=np.zeros((s, w), np.float32),
  )
  for row, (wanted, nth) in rows.items():
    drawn["temperature"][row] = wanted.temperature
    drawn["top_k"][row] = min(wanted.top_k or vocab_size, vocab_size)
    drawn["top_p"][row] = wanted.top_p if wanted.top_p < 1 else np.inf
    drawn["min_p"][row], drawn["penalty"][row] = wanted.min_p, wanted.repetition_penalty
    drawn["seeds"][row] = wanted.seed + nth
    drawn["bias_tokens"][row, : len(wanted.logit_bias)] = list(wanted.logit_bias)
    drawn["biases"][row, : len(wanted.logit_bias)] = list(wanted.logit_bias.values())
  return Draws(**drawn)


def adjust(logits: jax.Array, draws: Draws, seen: jax.Array) -> jax.Array:
  """`logits` f32[S,V] after repetition penalty (Keskar et al. 2019, §4.1) and bias.

  `seen` bool[S,V] are the tokens of each row's text so far.
  """

  def penalised():
    penalty = draws.penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

  logits = jax.lax.cond(jnp.any(draws.penalty != 1), penalised, lambda: logits)
  rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
  return logits.at[rows, draws.bias_tokens].add(draws.biases, mode="drop")


def draw(logits: jax.Array, draws: Draws, positions: jax.Array) -> jax.Array:
  """The next token i32[S] of each row from its `logits` f32[S,V], by the Gumbel-max trick.

  The noise depends on nothing but the row's seed, the token's position i32[S] and its id.
  """

  def noise(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

  def drawn():
    warm = (draws.temperature > 0)[:, None]
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)  # no overflow when nearly cold
    scaled = scaled / jnp.where(warm, draws.temperature[:, None], 1)
    kept = likely(scaled, draws)
    noisy = scaled + jax.vmap(noise)(draws.seeds, positions)
    return jnp.argmax(jnp.where(warm, jnp.where(kept, noisy, -jnp.inf), logits), axis=-1)

  def greedy():
    return jnp.argmax(logits, axis=-1)

  return jax.lax.cond(jnp.any(draws.temperature > 0), drawn, greedy).astype(jnp.int32)


def likely(logits: jax.Array, draws: Draws) -> jax.Array:
  """The tokens that top-k, nucleus and min-p sampling keep of `logits` f32[S,V]: bool[S,V].

  Nucleus: Holtzman et al. 2020, §3.1, among the top k. Min-p: Nguyen et al. 2024, §3, relative to
  the most likely token. Of tokens that are equally likely, those with lower ids come first.
  """
  values = jnp.sort(logits, axis=-1, descending=True)
  rank = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
  top = rank < draws.top_k[:, None]
  weights = jax.nn.softmax(jnp.where(top, values, -jnp.inf), axis=-1)
  before = jnp.cumsum(weights, axis=-1) - weights
  kept = top & ((before < draws.top_p[:, None]) | (rank == 0))
  lowest = jnp.min(jnp.where(kept, values, jnp.inf), axis=-1, keepdims=True)
  room = jnp.sum(kept & (values == lowest), axis=-1, dtype=jnp.int32, keepdims=True)
  ties = logits == lowest
  first = ties & (jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= room)
  return ((logits > lowest) | first) & (logits >= values[:, :1] + jnp.log(draws.min_p)[:, None])


def logprob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """f32[S] log-probability of `tokens` i32[S] under the model's own `logits` f32[S,V]."""
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
