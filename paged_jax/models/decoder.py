"""One decoder for all families, on the paged cache or dense. Layers are stacked along a leading axis.

Axis letters besides the cache's: M sequences of C tokens, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paged_jax import cache as cache_lib
from paged_jax import groups as groups_lib
from paged_jax.models import pattern, ropes
from paged_jax.models.config import DecoderConfig, Group
from paged_jax.models.layers import Layer, Linear, Norm
from paged_jax.types import Cache, Plan

NO_WINDOW = np.iinfo(np.int32).max


class Embedding(nnx.Module):
  """A vector per token."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    init = nnx.initializers.normal(0.02)
    shape = (config.vocab_size, config.hidden_size)
    self.weight = nnx.Param(init(rngs.params(), shape, jnp.float32))


class Decoder(nnx.Module):
  """A decoder-only language model. `layers` holds the parameters of all layers, [L, ...].

  >>> import jax.numpy as jnp
  >>> from paged_jax import models
  >>> decoder = models.load(models.embedded())
  >>> decoder.dense(jnp.array([[5, 6, 7]])).shape
  (1, 3, 512)
  """

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def stack(rngs):
      return Layer(config, rngs=rngs)

    self.config = config
    self.embed_tokens = Embedding(config, rngs=rngs)
    self.layers = stack(rngs)
    self.norm = Norm(config.hidden_size, config)
    self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, rngs=rngs)

  def __call__(
    self, tokens: jax.Array, cache: Cache | tuple[Cache, ...], plan: Plan | tuple[Plan, ...]
  ) -> tuple[jax.Array, Any]:
    """Runs one ragged batch, whose keys and values join the cache.

    Args:
      tokens: i32[B] tokens at the plan's rows and positions.
      cache: Caches with room for them (`extend` first), one per group of `config.groups`, as
        `models.cache_config` describes them. Or one cache for all layers, if all have one shape.
      plan: From `paged_jax.plan(cache, rows, positions)`, a tuple if `cache` is one.

    Returns:
      The final hidden states [B,E], for `logits` of the tokens that need them, and the cache or
      the tuple of caches.

    Raises:
      ValueError: The caches are not those of the groups.
    """
    groups = self.config.groups if groups_lib.several(cache) else (self.config.uniform,)
    caches, plans = groups_lib.each(cache), groups_lib.each(plan)
    _check(caches, plans, groups)

    def attend(caches, group, index, q, k, v, **options):
      cache = cache_lib.write(caches[group], index, k, v, plans[group])
      heads = cache_lib.attend(cache, index, q, plans[group], **options)
      return heads, (*caches[:group], cache, *caches[group + 1 :])

    x, caches = self._run(tokens, plans[0].positions, groups, attend, caches)
    return x, groups_lib.like(cache, caches)

  def dense(self, tokens: jax.Array) -> jax.Array:
    """Runs whole sequences without a cache, for training.

    Args:
      tokens: i32[M,C] tokens, from position 0 on. Ropes that depend on the length of a text
        (`dynamic`, `longrope`) turn as in a text of C tokens.

    Returns:
      f32[M,C,V] logits.
    """

    m, c = tokens.shape

    def attend(state, group, index, q, k, v, **options):
      del group, index
      if v is None:
        v = k[..., : self.config.uniform.value_dim]
      q, k, v = (x.reshape(m, c, *x.shape[1:]) for x in (q, k, v))
      heads = jax.vmap(partial(attention, **options))(q, k, v)
      return heads.reshape(m * c, *heads.shape[2:]), state

    groups, positions = (self.config.uniform,), jnp.tile(jnp.arange(c), m)
    x, _ = self._run(tokens.reshape(-1), positions, groups, attend, None, length=c)
    return self.logits(x).reshape(m, c, -1)

  def logits(self, x: jax.Array) -> jax.Array:
    """f32[B,V] logits of hidden states [B,E]."""
    head = self.embed_tokens if self.lm_head is None else self.lm_head
    logits = jnp.einsum("be,ve->bv", x, head.weight[...], preferred_element_type=jnp.float32)
    cap = self.config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def _run(self, tokens, positions, groups, attend, state, length=0):
    """Embeds, runs the layers with `attend(state, group, index, q, k, v, ...)`, normalises."""
    config = self.config
    graph, stack = nnx.split(self.layers)
    number = {i: g for g, group in enumerate(groups) for i in group.layers}
    index = {i: j for group in groups for j, i in enumerate(group.layers)}
    distinct = list(dict.fromkeys(config.ropes))  # most models have one for all layers, or two
    turns = ropes.turns(distinct, positions, config.rope_dim, length)
    kinds = [distinct.index(rope) for rope in config.ropes]
    windows = [NO_WINDOW if window is None else window for window in config.windows]
    # what differs from layer to layer: its numbers in the stack and in the cache, window, rope
    layers = range(config.num_layers)
    table = np.array([(i, index[i], windows[i], kinds[i]) for i in layers], np.int32)

    def layer(run, carry, xs):
      (x, state), (row, params) = carry, xs
      i, index, window, kind = row
      if params is None:
        params = jax.tree.map(lambda x: _at(x, i), stack)
      cos, sin = (_at(turn, kind) for turn in turns)
      layer = nnx.merge(graph, params)
      seen = {config.windows[i] for i in run.flat}
      window = window if len(seen) > 1 else seen.pop()
      sinks = layer.self_attn.sinks
      heads, state = attend(
        state, number[run[0, 0]], index, *layer.qkv(x, cos, sin), window=window,
        scale=config.attention_scale, softcap=config.attention_softcap,
        sinks=None if sinks is None else sinks[...].astype(jnp.float32),
      )  # fmt: skip
      return layer.finish(x, heads), state

    def block(runs, carry, rows):
      for run, each in zip(runs, rows):
        # A loop over a whole stack takes its slices from the loop, so that its gradient needs no sum.
        params = stack if run.size == config.num_layers else None
        carry = _loop(partial(layer, run), carry, (each, params))
      return carry

    x = self.embed_tokens.weight.at[tokens].get(mode="fill")  # no such token: NaN
    carry = (
      x * jnp.asarray(config.embed_scale, x.dtype),
      state,
    )  # rounded as the weights are (Gemma)
    for runs in pattern.loops([number[i] for i in layers]):
      carry = _loop(partial(block, runs), carry, [table[run] for run in runs])
    x, state = carry
    return self.norm(x), state


def abstract(config: DecoderConfig) -> Decoder:
  """A decoder of shapes and dtypes, without weights."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def _loop(body: Callable, carry: Any, xs: Any) -> Any:
  """`carry` after `body(carry, x)` for each `x` of `xs`. A single step is no loop."""
  if len(jax.tree.leaves(xs)[0]) == 1:
    return body(carry, jax.tree.map(lambda x: x[0], xs))
  return jax.lax.scan(lambda carry, x: (body(carry, x), None), carry, xs)[0]


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
  """The part of `x` [N,...] with this index i32[]."""
  return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _check(caches: Sequence[Cache], plans: Sequence[Plan], groups: Sequence[Group]) -> None:
  """Raises unless there is one cache, of as many layers, and one plan for each group."""
  sizes = [cache.pages.kv.shape[1] for cache in caches]
  wanted = [len(group.layers) for group in groups]
  if sizes != wanted or len(plans) != len(groups):
    raise ValueError(
      f"cache and plan must be for groups of {wanted} layers, got caches of {sizes} layers and"
      f" {len(plans)} plans"
    )


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None, window: int | jax.Array | None,
  softcap: float | None, sinks: jax.Array | None,
) -> jax.Array:  # fmt: skip
  """Causal attention of queries [C,Q,D] to keys and values [C,H,D], softmax in float32."""
  c, h, d = k.shape
  q = q.reshape(c, h, -1, d)
  logits = jnp.einsum("qhgd,khd->hgqk", q, k, preferred_element_type=jnp.float32)
  logits = logits * (d**-0.5 if scale is None else scale)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  age = jnp.arange(c)[:, None] - jnp.arange(c)[None]  # of each key, seen from each query
  visible = age >= 0 if window is None else (age >= 0) & (age < window)
  logits = jnp.where(visible[None, None], logits, -jnp.inf)
  if sinks is not None:  # one more key, without a value
    sinks = jnp.broadcast_to(sinks.reshape(h, -1, 1, 1), (*logits.shape[:3], 1))
    logits = jnp.concatenate([logits, sinks], axis=-1)
  weights = jax.nn.softmax(logits, axis=-1)[..., :c]
  return jnp.einsum("hgqk,khd->qhgd", weights.astype(v.dtype), v).reshape(c, -1, v.shape[-1])
