"""Which token comes next: pure functions that draw it.

Axis letters: S rows, V vocabulary, W biased tokens per row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.engine.sampling import MAX_BIASES, Sampling


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
