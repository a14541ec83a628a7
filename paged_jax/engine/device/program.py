"""The engine's device program: a piece of prompts beside one decode step, and more steps after it.

Axis letters: S rows, V vocabulary, C prompt tokens of a call, K steps of a call, E stop tokens, W
tokens of a row in a step (the last one drawn, and those that a drafter expects to follow), X longest
text.

    # step 0    [W tokens of each running row | C tokens of prompts]    one forward pass
    # step 1..  [W tokens of each running row]                          as long as any runs
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import paged_jax
from paged_jax import groups, meshes
from paged_jax.engine.device import beams
from paged_jax.engine.device import draws as draws_lib
from paged_jax.engine.device.drafts import Drafter
from paged_jax.engine.device.draws import Adjustments
from paged_jax.engine.device.records import (
  BeamReport,
  Edits,
  Past,
  Prompts,
  Report,
  Rows,
  blank,
  most_prompts,
  pack,
)
from paged_jax.types import Log


class _State(NamedTuple):
  step: jax.Array
  cache: Any
  rows: Rows
  past: Past
  report: Report
  growth: jax.Array  # i32[K,S]
  kept: jax.Array  # i32[K,S] lengths after a step that drafts were trimmed off


def run(
  cache: Any,
  model: Any,
  rows: Rows,
  past: Past,
  edits: Edits,
  prompts: Prompts | None,
  adjustments: Adjustments | None = None,
  *,
  num_steps: int,
  drafter: Drafter | None = None,
  num_beams: int = 1,
  implementation: Any = None,
) -> tuple[Any, Log, tuple[Rows, Past, jax.Array]]:
  """Runs up to `num_steps` decode steps; the first one carries the prompts along.

  The caller sees to the pages: a row that gets none waits.

  Args:
    cache: The cache, or those of all groups of the model's layers.
    model: `model(tokens i32[B], cache, plan) -> (hidden [B,...], cache)` and
      `model.logits(hidden [B,...]) -> f32[B,V]`.
    rows: What `run` returned before.
    past: What `run` returned before.
    edits: The host's changes, made first.
    prompts: Pieces of prompts, None for none.
    adjustments: Of logits. None: nobody searches either, or asks for log-probabilities.
    num_steps: K.
    drafter: Guesses tokens to be verified in the same pass.
    num_beams: The most rows that a beam search has; 1 = nobody searches.
    implementation: Of attention, see `paged_jax.plan`; of each group.

  Returns:
    As `Manager.run` wants it: cache, log, and (rows, past, packed report).
  """
  if num_beams > 1 and adjustments is None:
    raise ValueError(f"{num_beams=} needs adjustments")
  s, rows = len(_lengths(cache)), _edited(rows, edits)
  w = 1 if drafter is None else 1 + drafter.num_drafts
  report = blank(
    num_steps, w, s, with_logprobs=adjustments is not None, searching=num_beams > 1
  )._replace(remaining=rows.remaining)
  if report.beams is not None:
    report = report._replace(beams=report.beams._replace(scores=rows.scores))
  state = _State(
    step=jnp.zeros((), jnp.int32),
    cache=cache,
    rows=rows,
    past=past,
    report=report,
    growth=jnp.zeros((num_steps, s), jnp.int32),
    kept=jnp.full((num_steps, s), -1, jnp.int32),
  )
  step = functools.partial(
    _step, model, adjustments, drafter=drafter, num_beams=num_beams, implementation=implementation
  )
  if prompts is not None:
    state = step(state, prompts)

  def unfinished(state):
    return (state.step < num_steps) & jnp.any(state.rows.remaining > 0)

  if prompts is None or num_steps > 1:
    state = jax.lax.while_loop(unfinished, lambda state: step(state, None), state)
  ran = [("extend", state.growth)]
  ran += [("trim", state.kept)] if drafter is not None else []
  ran += [("reorder", state.report.beams.sources)] if state.report.beams else []
  log = Log(operands=tuple((x,) for _, x in ran), verbs=tuple(verb for verb, _ in ran))
  return state.cache, log, (state.rows, state.past, pack(state.report))


def _lengths(cache: Any) -> jax.Array:
  """i32[S] tokens of each row, the same in all groups."""
  return groups.each(cache)[0].lengths


def _edited(rows: Rows, edits: Edits) -> Rows:
  """The rows, those that the host has changed as it wants them."""

  def choose(new, old):
    return jnp.where(edits.changed.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  return jax.tree.map(choose, edits.rows, rows)


class _Pass(NamedTuple):
  """What one pass of the model gives, and whom it is for."""

  tokens: jax.Array  # i32[S,W] of the rows, in the cache now
  widths: jax.Array  # i32[S] how many of them
  logits: jax.Array  # f32[S,W,V] after each
  draws: jax.Array  # bool[S] rows that draw


def _step(
  model: Any,
  adjustments: Adjustments | None,
  state: _State,
  prompts: Prompts | None,
  *,
  drafter: Drafter | None,
  num_beams: int,
  implementation: Any,
) -> _State:
  """The next tokens of each running row, and the prompts' in the same pass."""
  cache, rows, past, report, step = state.cache, state.rows, state.past, state.report, state.step
  everyone = jnp.arange(len(_lengths(cache)), dtype=jnp.int32)
  starts = jnp.zeros(everyone.shape, bool) if prompts is None else prompts.starts
  tokens, widths = _batch(drafter, rows, past, _lengths(cache))
  widths = jnp.where(starts, 0, widths)
  cache, info = paged_jax.extend(cache, widths)
  widths = jnp.where(info.ok, widths, 0)
  growth = state.growth.at[step].set(widths)
  logits, cache = _logits(model, cache, tokens, widths, prompts, implementation)
  if prompts is not None:
    given = (starts & (prompts.last == prompts.tokens.shape[0]))[:, None]
    logits = logits.at[:, 0].set(jnp.where(given, past.logits, logits[:, 0]))
    past = dataclasses.replace(past, logits=jnp.where(starts[:, None], logits[:, 0], past.logits))

  made = _Pass(tokens, widths, logits, draws=(widths > 0) | starts)
  choice, told = None, report.beams
  if told is not None and adjustments is not None:
    choice, cache, rows, past, made = _search(cache, rows, past, made, adjustments, num_beams)
    told = BeamReport(told.sources.at[step].set(choice.sources), choice.scores)
  lengths = _lengths(cache)
  first = lengths - jnp.maximum(made.widths - 1, 0)  # where the next token will be
  rows, past, new, logprobs, counts, broken = _draw(rows, past, made, adjustments, first, choice)
  kept = jnp.where(made.widths > 1, lengths - made.widths + counts, lengths)
  if drafter is not None:
    cache, _ = paged_jax.trim(cache, kept)
  return _State(
    step=step + 1,
    cache=cache,
    rows=rows,
    past=past,
    report=Report(
      tokens=report.tokens.at[step].set(new),
      logprobs=report.logprobs.at[step].set(logprobs),
      counts=report.counts.at[step].set(counts),
      remaining=rows.remaining,
      broken=report.broken | broken,
      beams=told,
    ),
    growth=growth,
    kept=state.kept.at[step].set(kept),
  )


def _search(
  cache: Any,
  rows: Rows,
  past: Past,
  made: _Pass,
  adjustments: Adjustments,
  num_beams: int,
) -> tuple[beams.Choice, Any, Rows, Past, _Pass]:
  """Rows that search become those that they go on with; the tokens to draw are in the choice."""
  searches = rows.groups < len(rows.groups)
  ended = searches & (rows.scores > -jnp.inf) & ~made.draws

  def chosen():
    adjusted = draws_lib.adjust(made.logits[:, 0], adjustments, past.seen)
    logprobs = jax.nn.log_softmax(adjusted)
    return beams.choose(logprobs, rows.groups, rows.scores, ended, num_beams=num_beams)

  # Others may have asked for this program: then there is nothing to choose.
  choice = jax.lax.cond(jnp.any(searches), chosen, lambda: beams.same(rows.scores))
  to = choice.sources
  cache, _ = paged_jax.reorder(cache, to)
  lost = searches & made.draws & (choice.scores == -jnp.inf)  # nothing to go on with
  rows = dataclasses.replace(
    rows, tokens=rows.tokens[to], remaining=rows.remaining[to], scores=choice.scores
  )
  past = dataclasses.replace(past, seen=past.seen[to], texts=past.texts[to])
  made = _Pass(
    tokens=made.tokens,
    widths=made.widths[to],
    logits=jnp.where(lost[:, None, None], jnp.nan, made.logits[to]),
    draws=jnp.where(searches, choice.grows | lost, made.draws),
  )
  return choice, cache, rows, past, made


def _draw(
  rows: Rows,
  past: Past,
  made: _Pass,
  adjustments: Adjustments | None,
  first: jax.Array,
  choice: beams.Choice | None,
) -> tuple[Rows, Past, jax.Array, jax.Array, jax.Array, jax.Array]:
  """As many tokens of each row as a pass allows: one, and more as long as it foresaw them.

  Returns:
    Rows and what they have read, tokens i32[W,S], their log-probabilities f32[W,S] (S = 0 without
    adjustments), how many of them were drawn i32[S], and whose logits were not numbers, bool[S]:
    such a row ends.
  """
  tokens, logprobs = [], []
  draws, counts, broken = made.draws, jnp.zeros_like(made.widths), jnp.zeros_like(made.draws)
  for nth in range(made.tokens.shape[1]):
    if nth:
      draws &= (nth < made.widths) & (rows.remaining > 0) & (made.tokens[:, nth] == rows.tokens)
    logits = made.logits[:, nth]
    adjusted = logits
    if adjustments is not None:
      adjusted = draws_lib.adjust(logits, adjustments, past.seen)
    new, sane = draws_lib.draw(adjusted, rows.draws, first + nth)
    broken |= draws & ~sane
    draws &= sane
    if choice is not None:
      new = jnp.where(rows.groups < rows.groups.shape[0], choice.tokens, new)
    new = jnp.where(draws, new, rows.tokens)
    rows, past = _taken(rows, past, new, draws, first + nth)
    tokens.append(new)
    logprobs.append(draws_lib.logprob(logits, new) if adjustments else jnp.zeros(0, jnp.float32))
    counts += draws.astype(jnp.int32)
  rows = dataclasses.replace(rows, remaining=jnp.where(broken, 0, rows.remaining))
  return rows, past, jnp.stack(tokens), jnp.stack(logprobs), counts, broken


def _batch(
  drafter: Drafter | None, rows: Rows, past: Past, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Tokens i32[S,W] for each row's next positions, and how many of them to take: i32[S]."""
  tokens = rows.tokens[:, None]
  widths = jnp.minimum(rows.remaining, 1)
  if drafter is not None:
    drafts = drafter(past.texts, lengths + 1).astype(jnp.int32)
    tokens = jnp.concatenate([tokens, drafts], axis=1)
    alone = rows.groups == rows.groups.shape[0]
    widths = jnp.where(alone, jnp.minimum(rows.remaining, tokens.shape[1]), widths)
  return tokens, widths


def _logits(
  model: Any,
  cache: Any,
  tokens: jax.Array,
  widths: jax.Array,
  prompts: Prompts | None,
  implementation: Any,
) -> tuple[jax.Array, Any]:
  """Logits f32[S,W,V] after each of the rows' tokens; the first ones of a row that starts are those
  after its prompt."""
  s, w = tokens.shape
  nth = jnp.arange(w, dtype=jnp.int32)[None]
  everyone = jnp.arange(s, dtype=jnp.int32)[:, None]
  ids = jnp.where(nth < widths[:, None], everyone, s)
  positions = (_lengths(cache) - widths)[:, None] + nth
  batch = tuple(x.reshape(-1) for x in (tokens, ids, positions))
  wanted = everyone * w + nth
  if prompts is not None:
    batch = tuple(jnp.concatenate(pair) for pair in zip(batch, prompts[:3]))
    wanted = wanted.at[:, 0].set(jnp.where(prompts.starts, s * w + prompts.last, wanted[:, 0]))
  tokens, ids, positions = batch
  parts = ((s * w, s, w),)
  if size := len(tokens) - s * w:
    parts += ((size, most_prompts(size), size),)
  plan = paged_jax.plan(cache, ids, positions, implementation=implementation, parts=parts)
  hidden, cache = model(tokens, cache, plan)
  logits = model.logits(hidden.at[wanted.reshape(-1)].get(mode="clip"))
  if (split := groups.each(cache)[0].pages.split) is not None:
    if logits.shape[1] % split.ways == 0:  # else XLA would gather the weights
      logits = meshes.place(logits, split.mesh, PartitionSpec(None, split.axis))
    logits = meshes.place(logits, split.mesh, PartitionSpec())  # drawing needs no other device
  return logits.reshape(s, w, -1), cache


def _taken(
  rows: Rows, past: Past, new: jax.Array, draws: jax.Array, positions: jax.Array
) -> tuple[Rows, Past]:
  """Rows and what they have read once the rows in `draws` bool[S] have drawn `new` i32[S]."""
  everyone = jnp.arange(len(new), dtype=jnp.int32)
  ended = jnp.any(new[:, None] == rows.stop_tokens, axis=1)
  remaining = jnp.where(draws, jnp.where(ended, 0, rows.remaining - 1), rows.remaining)
  vocab, longest = past.seen.shape[1], past.texts.shape[1]
  past = dataclasses.replace(
    past,
    seen=past.seen.at[everyone, jnp.where(draws, new, vocab)].set(True, mode="drop"),
    texts=past.texts.at[everyone, jnp.where(draws, positions, longest)].set(new, mode="drop"),
  )
  return dataclasses.replace(rows, tokens=new, remaining=remaining), past


def read(past: Past, row: jax.Array, tokens: jax.Array, length: jax.Array) -> Past:
  """`past` where `row` i32[] has read exactly the first `length` i32[] of `tokens` i32[X]."""
  vocab, longest = past.seen.shape[1], past.texts.shape[1]
  live = jnp.arange(tokens.shape[0], dtype=jnp.int32) < length
  seen = past.seen.at[row].set(False).at[row, jnp.where(live, tokens, vocab)].set(True, mode="drop")
  return dataclasses.replace(past, seen=seen, texts=past.texts.at[row].set(tokens[:longest]))


def give(past: Past, row: jax.Array, logits: jax.Array) -> Past:
  """`past` where `logits` f32[V] came after the prompt of `row` i32[]."""
  return dataclasses.replace(past, logits=past.logits.at[row].set(logits))


def take(past: Past, row: jax.Array) -> jax.Array:
  """f32[V] the logits after the prompt of `row` i32[]."""
  return past.logits[row]
