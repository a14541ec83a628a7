"""The engine's device program: a piece of prompts beside one decode step, and more steps after it.

Axis letters: S rows, V vocabulary, C prompt tokens of a call, K steps of a call, E stop tokens.

    # step 0    [one token of each running row | C tokens of prompts]    one forward pass
    # step 1..  [one token of each running row]                          as long as any runs
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import paged_jax
from paged_jax.engine import sampling
from paged_jax.types import Cache, Log


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What each row decodes. Lives on the device from call to call."""

  tokens: jax.Array  # i32[S] the row's last token, not in the cache yet
  remaining: jax.Array  # i32[S] tokens still to draw, 0 = idle
  stop_tokens: jax.Array  # i32[S,E] V = none
  draws: sampling.Draws


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
  last: jax.Array  # bool[S] rows whose prompt ends here: they decode from the next step on


class Report(NamedTuple):
  """What a call tells the host."""

  tokens: jax.Array  # i32[K,S]
  logprobs: jax.Array  # f32[K,S]
  drawn: jax.Array  # bool[K,S] the row drew a token in that step
  remaining: jax.Array  # i32[S] tokens still to draw
  broken: jax.Array  # bool[S] the row's logits were not numbers; it ended


class _State(NamedTuple):
  step: jax.Array
  cache: Cache
  rows: Rows
  seen: jax.Array
  report: Report
  growth: jax.Array  # i32[K,S]


def run(
  cache: Cache,
  model: Any,
  rows: Rows,
  seen: jax.Array,
  edits: Edits,
  prompts: Prompts | None,
  *,
  num_steps: int,
) -> tuple[Cache, Log, tuple[Rows, jax.Array, Report]]:
  """Runs up to `num_steps` decode steps; the first one carries the prompts along.

  The caller sees to the pages: a row that gets none waits.

  Args:
    cache: The cache.
    model: `model(tokens i32[B], cache, plan) -> (hidden [B,...], cache)` and
      `model.logits(hidden [S,...]) -> f32[S,V]`.
    rows: What `run` returned before.
    seen: bool[S,V] tokens in each row's text, needed where there is a repetition penalty.
    edits: The host's changes, made first.
    prompts: Pieces of prompts, None for none.
    num_steps: K.

  Returns:
    As `Manager.run` wants it: cache, log, and (rows, seen, report).
  """
  s = cache.ledger.num_rows
  rows = jax.tree.map(
    lambda new, old: jnp.where(edits.changed.reshape(-1, *[1] * (old.ndim - 1)), new, old),
    edits.rows,
    rows,
  )
  state = _State(
    step=jnp.zeros((), jnp.int32),
    cache=cache,
    rows=rows,
    seen=seen,
    report=Report(
      tokens=jnp.zeros((num_steps, s), jnp.int32),
      logprobs=jnp.zeros((num_steps, s), jnp.float32),
      drawn=jnp.zeros((num_steps, s), bool),
      remaining=rows.remaining,
      broken=jnp.zeros(s, bool),
    ),
    growth=jnp.zeros((num_steps, s), jnp.int32),
  )
  if prompts is not None:
    state = _step(model, state, prompts)

  def unfinished(state):
    return (state.step < num_steps) & jnp.any(state.rows.remaining > 0)

  state = jax.lax.while_loop(unfinished, lambda state: _step(model, state, None), state)
  log = Log(operands=((state.growth,),), verbs=("extend",))
  return state.cache, log, (state.rows, state.seen, state.report)


def _step(model: Any, state: _State, prompts: Prompts | None) -> _State:
  """One token of each running row, and the prompts' in the same pass."""
  cache, rows, report, step = state.cache, state.rows, state.report, state.step
  s = cache.ledger.num_rows
  active = rows.remaining > 0
  if prompts is not None:
    active &= ~prompts.last
  growth = active.astype(jnp.int32)
  cache, info = paged_jax.extend(cache, growth)
  active &= info.ok
  ids = jnp.where(active, jnp.arange(s, dtype=jnp.int32), s)
  batch = (rows.tokens, ids, cache.lengths - 1)
  if prompts is not None:
    batch = tuple(jnp.concatenate(pair) for pair in zip(batch, prompts[:3]))
  tokens, ids, positions = batch
  hidden, cache = model(tokens, cache, paged_jax.plan(cache, ids, positions))
  logits = model.logits(hidden[:s])

  adjusted = sampling.adjust(logits, rows.draws, state.seen)
  sane = jnp.isfinite(jnp.max(adjusted, axis=-1))
  drawn = active & sane
  new = sampling.draw(adjusted, rows.draws, cache.lengths)
  new = jnp.where(drawn, new, rows.tokens)
  ended = ~sane | jnp.any(new[:, None] == rows.stop_tokens, axis=1)
  remaining = jnp.where(active, jnp.where(ended, 0, rows.remaining - 1), rows.remaining)
  everyone = jnp.arange(s, dtype=jnp.int32)
  unseen = logits.shape[1]
  return _State(
    step=step + 1,
    cache=cache,
    rows=dataclasses.replace(rows, tokens=new, remaining=remaining),
    seen=state.seen.at[everyone, jnp.where(drawn, new, unseen)].set(True, mode="drop"),
    report=Report(
      tokens=report.tokens.at[step].set(new),
      logprobs=report.logprobs.at[step].set(sampling.logprob(logits, new)),
      drawn=report.drawn.at[step].set(drawn),
      remaining=remaining,
      broken=report.broken | (active & ~sane),
    ),
    growth=state.growth.at[step].set(jnp.where(info.ok, growth, 0)),
  )


def mark(seen: jax.Array, row: jax.Array, tokens: jax.Array) -> jax.Array:
  """`seen` with exactly `tokens` i32[X] (V pads) in `row` i32[]."""
  return seen.at[row].set(False, mode="drop").at[row, tokens].set(True, mode="drop")
