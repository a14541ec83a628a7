"""Beam search: the choice of one step, for all searches of a batch at once.

The W best texts of {those that have ended} and {the others with one more token}; one that has ended
keeps its score, and its place as long as it is among the best (Graves 2012, §3.1, without the
lookahead). Axis letters: S rows, V vocabulary, M candidates of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
  """What each row becomes. Rows outside any search stay what they are."""

  sources: jax.Array  # i32[S] whose text the row goes on with
  tokens: jax.Array  # i32[S] the token that comes next
  grows: jax.Array  # bool[S] False: the text has ended, there is no next token
  scores: jax.Array  # f32[S] log-probability of the text, -inf = no text


def same(scores: jax.Array) -> Choice:
  """The choice of rows that do not search, with their `scores` f32[S]."""
  none = jnp.zeros(len(scores), jnp.int32)
  return Choice(jnp.arange(len(scores), dtype=jnp.int32), none, none > 0, scores)


def choose(
  logprobs: jax.Array, groups: jax.Array, scores: jax.Array, ended: jax.Array, *, num_beams: int
) -> Choice:
  """The next beams of every search.

  Args:
    logprobs: f32[S,V] of each row's next token; one that is not a number is never chosen.
    groups: i32[S] rows with the same number, below S, are the beams of one search; S = none.
    scores: f32[S] log-probability of each row's text, -inf where it has none yet.
    ended: bool[S] texts that do not go on.
    num_beams: M, at least the number of rows of any search.
  """
  s, vocab = logprobs.shape
  rows = jnp.arange(s, dtype=jnp.int32)
  gains, tokens = jax.lax.top_k(
    jnp.where(jnp.isnan(logprobs), -jnp.inf, logprobs), min(num_beams, vocab)
  )
  m = gains.shape[1]
  stays = jnp.where(jnp.arange(m)[None] == 0, jnp.float32(0), -jnp.inf)
  candidates = scores[:, None] + jnp.where(ended[:, None], stays, gains)  # f32[S,M]
  _, losses, order = jax.lax.sort(
    (jnp.repeat(groups, m), -candidates.reshape(-1), jnp.arange(s * m, dtype=jnp.int32)),
    num_keys=2, is_stable=True,
  )  # fmt: skip
  before = jnp.sum(groups[None] < groups[:, None], axis=1, dtype=jnp.int32)
  nth = jnp.sum(
    (groups[None] == groups[:, None]) & (rows[None] < rows[:, None]), axis=1, dtype=jnp.int32
  )
  at = m * before + nth
  score = -losses[at]
  found = (groups < s) & (score > -jnp.inf)
  sources = jnp.where(found, order[at] // m, rows)
  return Choice(
    sources=sources,
    tokens=tokens.reshape(-1)[order[at]].astype(jnp.int32),
    grows=found & ~ended[sources],
    scores=jnp.where(groups < s, score, scores),
  )
