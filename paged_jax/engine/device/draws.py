"""Which token comes next: pure functions that draw it.

Axis letters: S rows, V vocabulary, W biased tokens per row.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.engine.sampling import MAX_BIASES, Sampling

_MAX = 0x7FFFFFFF  # the largest i32: all bits except the sign
_BOTTOM = 0x7F800000  # the depth of a logit of -inf
_LANES = 128
# Thousands of cycles on v6e, by the compiler's estimate of November 2026, at V = 128,256:
_DIGIT = 2  # bits that a pass finds; a search with 1, 2, 3: 954, 622, 706
_PARTS = 3  # of a row, added before it is reduced; a search with 1, 2, 3: 1059, 692, 622
_ROWS = 64  # of a block; top-k and top-p of 256 rows in blocks of 64, 256: 6,200, 11,300


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """How each row draws."""

  temperature: jax.Array  # f32[S] 0 = the most likely token
  top_k: jax.Array  # i32[S] tokens to draw from, V = all
  top_p: jax.Array  # f32[S] mass to draw from, infinity = all
  min_p: jax.Array  # f32[S]
  seeds: jax.Array  # u32[S]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
  """How the logits of each row change before it draws."""

  penalty: jax.Array  # f32[S] 1 = none
  bias_tokens: jax.Array  # i32[S,W] V = none
  biases: jax.Array  # f32[S,W]


def draws(rows: Mapping[int, tuple[Sampling, int]], num_rows: int, vocab_size: int) -> Draws:
  """How each row draws, as NumPy arrays: row r as sample n of a request, for r: (sampling, n)."""
  drawn: dict[str, Any] = dict(
    temperature=np.zeros(num_rows, np.float32),
    top_k=np.full(num_rows, vocab_size, np.int32),
    top_p=np.full(num_rows, np.inf, np.float32),
    min_p=np.zeros(num_rows, np.float32),
    seeds=np.zeros(num_rows, np.uint32),
  )
  for row, (wanted, nth) in rows.items():
    if not wanted.temperature:
      continue  # the most likely token, whatever else is asked for
    drawn["temperature"][row], drawn["min_p"][row] = wanted.temperature, wanted.min_p
    drawn["top_k"][row] = min(wanted.top_k or vocab_size, vocab_size)
    drawn["top_p"][row] = wanted.top_p if wanted.top_p < 1 else np.inf
    drawn["seeds"][row] = wanted.seed + nth
  return Draws(**drawn)


def plain(wanted: Sampling) -> bool:
  """Whether a program without adjustments and log-probabilities is enough for a request."""
  changes = wanted.repetition_penalty != 1 or bool(wanted.logit_bias)
  return not changes and wanted.logprobs is None and wanted.num_beams == 1


def adjustments(rows: Mapping[int, Sampling], num_rows: int, vocab_size: int) -> Adjustments:
  """How the logits of each row change, as NumPy arrays."""
  penalty: Any = np.ones(num_rows, np.float32)
  tokens: Any = np.full((num_rows, MAX_BIASES), vocab_size, np.int32)
  biases: Any = np.zeros((num_rows, MAX_BIASES), np.float32)
  for row, wanted in rows.items():
    penalty[row] = wanted.repetition_penalty
    tokens[row, : len(wanted.logit_bias)] = list(wanted.logit_bias)
    biases[row, : len(wanted.logit_bias)] = list(wanted.logit_bias.values())
  return Adjustments(penalty, tokens, biases)


def adjust(logits: jax.Array, adjustments: Adjustments, seen: jax.Array) -> jax.Array:
  """`logits` f32[S,V] after repetition penalty (Keskar et al. 2019, §4.1) and bias.

  `seen` bool[S,V] are the tokens of each row's text so far.
  """

  def penalised():
    penalty = adjustments.penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

  logits = jax.lax.cond(jnp.any(adjustments.penalty != 1), penalised, lambda: logits)
  rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
  return logits.at[rows, adjustments.bias_tokens].add(adjustments.biases, mode="drop")


def draw(logits: jax.Array, draws: Draws, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The next token i32[S] of each row from its `logits` f32[S,V], and whether these are numbers.

  Drawn by the Gumbel-max trick; the noise depends on nothing but the row's seed, the token's position
  i32[S] and its id. Many rows are drawn block by block: a block fits into a TPU's fast memory, and
  leaves out what none of its rows asks for.
  """
  s = len(logits)
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  most = jnp.take_along_axis(logits, best[:, None], axis=-1)
  args = (logits, draws, positions, best, most)
  if s % _ROWS or s == _ROWS:
    tokens = _draw(*args)
  else:
    blocks = jax.tree.map(lambda x: x.reshape(-1, _ROWS, *x.shape[1:]), args)
    tokens = jax.lax.map(lambda block: _draw(*block), blocks).reshape(s)
  return tokens, jnp.isfinite(most[:, 0])


def _draw(
  logits: jax.Array, draws: Draws, positions: jax.Array, best: jax.Array, most: jax.Array
) -> jax.Array:
  """`draw` for one block, whose most likely tokens are `best` i32[S] with logits `most` f32[S,1]."""

  def noise(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

  def drawn():
    warm = draws.temperature > 0
    scaled = logits - most  # no overflow when nearly cold
    scaled = scaled / jnp.where(warm, draws.temperature, 1)[:, None]
    noisy = scaled + jax.vmap(noise)(draws.seeds, positions)
    tokens = jnp.argmax(jnp.where(likely(scaled, draws), noisy, -jnp.inf), axis=-1)
    return jnp.where(warm, tokens.astype(jnp.int32), best)

  return jax.lax.cond(jnp.any(draws.temperature > 0), drawn, lambda: best)


class _Cut(NamedTuple):
  """The first tokens of each row, the most likely ones first: those above a depth, and some at it."""

  depths: jax.Array  # i32[S]
  ties: jax.Array  # i32[S] how many of those at that depth, by lowest id; more than there are = all


def likely(logits: jax.Array, draws: Draws) -> jax.Array:
  """The tokens that top-k, nucleus and min-p sampling keep of `logits` f32[S,V]: bool[S,V].

  The most likely token's logit is 0. Nucleus: Holtzman et al. 2020, §3.1, among the top k. Min-p:
  Nguyen et al. 2024, §3, relative to the most likely token. Of tokens that are equally likely, those
  with lower ids come first. Nothing is sorted: see `_reach`.
  """
  depths, deepest = _depths(logits), _depths(jnp.log(draws.min_p))
  cut = _nucleus(logits, draws.top_p, _top(logits, draws.top_k))
  last = _last_tie(logits, cut)
  kept = (depths < cut.depths[:, None]) | (_ties(logits, cut) <= last[:, None])
  return kept & (depths <= deepest[:, None])


def _depths(logits: jax.Array) -> jax.Array:
  """How far floats are below 0, as i32 that order them: their bits without the sign. -0 is 0, too."""
  return _bits(logits) & _MAX


def _bits(numbers: jax.Array) -> jax.Array:
  """The bits of numbers of 32 bits, as i32."""
  return jax.lax.bitcast_convert_type(numbers, jnp.int32)


def _weights(depths: jax.Array) -> jax.Array:
  """The likelihood of tokens relative to the most likely one."""
  return jnp.exp(-jax.lax.bitcast_convert_type(depths, jnp.float32))


def _top(logits: jax.Array, top_k: jax.Array) -> _Cut:
  """The first `top_k` i32[S] tokens."""
  s, vocab = logits.shape
  everything = _Cut(jnp.full(s, _BOTTOM, jnp.int32), jnp.full(s, vocab, jnp.int32))

  def search():
    depths = _depths(logits)
    depth, above = _reach(top_k, depths, jnp.ones_like(depths))
    return _Cut(depth, top_k - above)

  return jax.lax.cond(jnp.any(top_k < vocab), search, lambda: everything)


def _nucleus(logits: jax.Array, top_p: jax.Array, cut: _Cut) -> _Cut:
  """The first tokens of `cut`, each one before which there is less than `top_p` f32[S] of its mass."""

  def search():
    # Without the barrier a TPU would read the logits again, from slow memory, to make the weights.
    depths = jax.lax.optimization_barrier(_depths(logits))
    weights = _weights(depths)
    above_cut = _sum(depths, cut.depths - 1, weights)
    goals = top_p * (above_cut + _weights(cut.depths) * cut.ties.astype(jnp.float32))
    depth, above = _reach(goals, depths, weights)
    at_cut = depth >= cut.depths
    depth, above = jnp.minimum(depth, cut.depths), jnp.where(at_cut, above_cut, above)
    ties = jnp.ceil((goals - above) / _weights(depth))
    ties = jnp.where(ties >= 1, jnp.minimum(ties, depths.shape[1]), 1).astype(jnp.int32)
    return _Cut(depth, jnp.where(at_cut, jnp.minimum(ties, cut.ties), ties))

  return jax.lax.cond(jnp.any(top_p < jnp.inf), search, lambda: cut)


def _ties(logits: jax.Array, cut: _Cut) -> jax.Array:
  """The ids i32[S,V] of the tokens at the cut's depth, the largest i32 for others."""
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.where(_depths(logits) == cut.depths[:, None], ids, _MAX)


def _last_tie(logits: jax.Array, cut: _Cut) -> jax.Array:
  """The id i32[S] of the last token at the cut's depth that is kept."""
  s, vocab = logits.shape
  all_of_them = jnp.full(s, vocab, jnp.int32)

  def search():
    ids = _ties(logits, cut)
    return _reach(cut.ties, ids, jnp.ones_like(ids), num_bits=vocab.bit_length())[0]

  count = _sum(_ties(logits, cut), all_of_them, jnp.ones(logits.shape, jnp.int32))
  return jax.lax.cond(jnp.any(count > cut.ties), search, lambda: all_of_them)


def _reach(
  goals: jax.Array, keys: jax.Array, values: jax.Array, *, num_bits: int = 31
) -> tuple[jax.Array, jax.Array]:
  """Where the `values` [S,V] of `keys` i32[S,V], added up in the order of their keys, reach `goals` [S].

  A search by digits of `_DIGIT` bits, the highest first: each pass over [S,V] finds one.

  Returns:
    The smallest i32[S] so that the values of all keys up to it reach the goal, 2**num_bits - 1 if they
    do not; and the sum [S] of the values below it.
  """

  def find(nth, state):
    found, below = state  # the sum by its bits
    shift = jnp.maximum(num_bits - _DIGIT * (nth + 1), 0)
    digit = jnp.zeros_like(found)
    for more in range(1, 2**_DIGIT):
      reached = _sum(keys, found + (more << shift) - 1, values)
      digit += (reached < goals).astype(jnp.int32)
      below = jnp.where(reached < goals, _bits(reached), below)
    return found + jnp.minimum(digit << shift, 2**num_bits - 1 - found), below

  # After a pass, a TPU updates `found` and `below` in one operation if both are of one type, and
  # needs one operation less for the next pass if they do not begin as constants.
  zeros = jax.lax.optimization_barrier(jnp.zeros(goals.shape, jnp.int32))
  found, below = jax.lax.fori_loop(0, -(-num_bits // _DIGIT), find, (zeros, zeros))
  return found, jax.lax.bitcast_convert_type(below, values.dtype)


def _sum(keys: jax.Array, end: jax.Array, values: jax.Array) -> jax.Array:
  """The sum [S] of the `values` [S,V] whose `keys` i32[S,V] are at most `end` i32[S].

  The parts of a row are added to each other first: a TPU reduces a row by one long chain of sums.
  """
  size = keys.shape[1] // (_PARTS * _LANES) * _LANES
  parts = [slice(nth * size, (nth + 1) * size) for nth in range(_PARTS)]

  def chosen(part):
    return jnp.where(keys[:, part] <= end[:, None], values[:, part], jnp.zeros((), values.dtype))

  whole = functools.reduce(jnp.add, map(chosen, parts))
  rest = chosen(slice(_PARTS * size, None))
  return jnp.sum(whole, axis=-1, dtype=values.dtype) + jnp.sum(rest, axis=-1, dtype=values.dtype)


def logprob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """f32[S] log-probability of `tokens` i32[S] under the model's own `logits` f32[S,V]."""
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
