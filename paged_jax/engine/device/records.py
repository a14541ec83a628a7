"""What the device keeps of rows, what a call takes along, and what it reports.

Axis letters: S rows, V vocabulary, C prompt tokens of a call, K steps of a call, E stop tokens, W
tokens of a row in a step, X longest text.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.engine.device.draws import Draws

MAX_PROMPTS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What each row decodes. Lives on the device from call to call."""

  tokens: jax.Array  # i32[S] the row's last token, not in the cache yet
  remaining: jax.Array  # i32[S] tokens still to draw, 0 = idle
  stop_tokens: jax.Array  # i32[S,E] V = none
  groups: jax.Array  # i32[S] rows with the same number are the beams of one search, S = none
  scores: jax.Array  # f32[S] log-probability of a beam's new tokens, -inf = it has no text
  draws: Draws


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
  """What rows have read. Lives on the device from call to call."""

  seen: jax.Array  # bool[S,V] tokens in the row's text, kept where there is a repetition penalty;
  # V = 0 in a program without adjustments
  texts: jax.Array  # i32[S,X] the row's text, kept for a drafter; X = 0 without one
  logits: jax.Array  # f32[S,V] after the row's prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
  """Rows that the host changes before a call."""

  changed: jax.Array  # bool[S]
  rows: Rows


class Prompts(NamedTuple):
  """Pieces of prompts, each row's in one piece, whose pages are there; S pads `rows`."""

  tokens: jax.Array  # i32[C]
  rows: jax.Array  # i32[C]
  positions: jax.Array  # i32[C]
  starts: jax.Array  # bool[S] rows whose prompt ends here: they draw their first token
  last: jax.Array  # i32[S] where in `tokens` it ends; C = all of it is cached, with its logits


def most_prompts(size: int) -> int:
  """Prompts that have a piece of a call's `size` prompt tokens, at most: attention takes them in
  blocks of one row each, and has room for as many that are not full."""
  return min(size, MAX_PROMPTS)


class BeamReport(NamedTuple):
  """What a call reports of beams."""

  sources: jax.Array  # i32[K,S] the row whose text it went on with
  scores: jax.Array  # f32[S]


class Report(NamedTuple):
  """What a call reports to the host."""

  tokens: jax.Array  # i32[K,W,S]
  logprobs: jax.Array  # f32[K,W,S]; S = 0: nobody asks
  counts: jax.Array  # i32[K,S] tokens that the row drew in that step
  remaining: jax.Array  # i32[S] tokens still to draw
  broken: jax.Array  # bool[S] the row's logits were not numbers; it ended
  beams: BeamReport | None  # None: no row searches


def blank(
  num_steps: int, width: int, num_rows: int, *, with_logprobs: bool, searching: bool
) -> Report:
  """A report of nothing."""
  k, w, s = num_steps, width, num_rows
  own = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (k, s))
  return Report(
    tokens=jnp.zeros((k, w, s), jnp.int32),
    logprobs=jnp.zeros((k, w, s if with_logprobs else 0), jnp.float32),
    counts=jnp.zeros((k, s), jnp.int32),
    remaining=jnp.zeros(s, jnp.int32),
    broken=jnp.zeros(s, bool),
    beams=BeamReport(own, jnp.zeros(s, jnp.float32)) if searching else None,
  )


def pack(report: Report) -> jax.Array:
  """A report as one array i32[X], since the host pays for each array that it reads."""

  def bits(x):
    real = x.dtype == jnp.float32
    return jax.lax.bitcast_convert_type(x, jnp.int32) if real else x.astype(jnp.int32)

  return jnp.concatenate([bits(x).reshape(-1) for x in jax.tree.leaves(report)])


def unpack(packed: np.ndarray, like: Report) -> Report:
  """The report, as NumPy arrays of the shapes and dtypes of those of `like`."""
  leaves, structure = jax.tree.flatten(like)
  values, rest = [], packed
  for x in leaves:
    part, rest = rest[: x.size], rest[x.size :]
    part = part.view(x.dtype) if x.dtype == np.float32 else part.astype(x.dtype, copy=False)
    values.append(part.reshape(x.shape))
  return jax.tree.unflatten(structure, values)
