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

  def __init__(self, vocab_size: int, size: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.normal(0.02)
    self.weight = nnx.Param(init(rngs.params(), (vocab_size, size), jnp.float32))

  def __call__(self, tokens: jax.Array, scale: float) -> jax.Array:
    """[B,size] vectors of `tokens` i32[B], NaN if there is no such token, times `scale`."""
    x = self.weight.at[tokens].get(mode="fill")
    return x * jnp.asarray(scale, x.dtype)  # rounded as the weights are (Gemma)


class Decoder(nnx.Module):
  """A decoder-only language model.

  `layers` holds the parameters of all layers, [L, ...]; a list of such stacks, one per
  `config.stacks`, if the layers have several shapes.

  >>> import jax.numpy as jnp
  >>> from paged_jax import models
  >>> decoder = models.load(models.embedded())
  >>> decoder.dense(jnp.array([[5, 6, 7]])).shape
  (1, 3, 512)
  """

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
    stacks = [_stack(config, layers, rngs) for layers in config.stacks]
    self.layers = stacks[0] if len(stacks) == 1 else nnx.List(stacks)
    self.norm = Norm(config.hidden_size, config)
    self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, rngs=rngs)
    if config.layer_input_size:
      size = config.num_layers * config.layer_input_size
      self.embed_tokens_per_layer = Embedding(config.layer_input_vocab_size, size, rngs=rngs)
      self.per_layer_model_projection = Linear(config.hidden_size, size, rngs=rngs)
      self.per_layer_projection_norm = Norm(config.layer_input_size, config)

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
      cache = caches[group]
      if k is not None:
        cache = cache_lib.write(cache, index, k, v, plans[group])
      heads = cache_lib.attend(cache, index, q, plans[group], **options)
      return heads, (*caches[:group], cache, *caches[group + 1 :])

    places = self.config.places(groups)
    x, caches = self._run(tokens, plans[0].positions, places, attend, caches)
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
    config, places, state = self.config, [(0, i) for i in range(self.config.num_layers)], ()
    if not all(shape.own for shape in config.layers):  # keep what later layers read
      places, dtype = config.places(config.groups), self.embed_tokens.weight.dtype
      shapes = [(m * c, group.num_kv_heads, group.head_dim) for group in config.groups]
      state = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes)

    def attend(state, group, index, q, k, v, **options):
      del index
      if k is None:
        k, v = state[group]
      elif state:
        state = (*state[:group], (k, v), *state[group + 1 :])
      v = k[..., : config.uniform.value_dim] if v is None else v
      q, k, v = (x.reshape(m, c, *x.shape[1:]) for x in (q, k, v))
      heads = jax.vmap(partial(attention, **options))(q, k, v)
      return heads.reshape(m * c, *heads.shape[2:]), state

    positions = jnp.tile(jnp.arange(c), m)
    x, _ = self._run(tokens.reshape(-1), positions, places, attend, state, length=c)
    return self.logits(x).reshape(m, c, -1)

  def logits(self, x: jax.Array) -> jax.Array:
    """f32[B,V] logits of hidden states [B,E]."""
    head = self.embed_tokens if self.lm_head is None else self.lm_head
    logits = jnp.einsum("be,ve->bv", x, head.weight[...], preferred_element_type=jnp.float32)
    cap = self.config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def _run(self, tokens, positions, places, attend, state, length=0):
    """Embeds, runs the layers with `attend(state, group, index, q, k, v, ...)`, normalises.

    `places` are each layer's (group, index).
    """
    config = self.config
    x = self.embed_tokens(tokens, config.embed_scale)
    inputs = self._layer_inputs(tokens, x)
    carry = x, state
    kinds = [(stack, group) for (stack, _), (group, _) in zip(config.stacked, places)]
    for runs in pattern.loops(kinds):
      bodies, rows = zip(
        *(self._alike(run, positions, places, attend, inputs, length) for run in runs)
      )
      carry = _loop(partial(_in_turn, bodies), carry, rows)
    x, state = carry
    return self.norm(x), state

  def _alike(self, run, positions, places, attend, inputs, length):
    """What runs the layers `run` i32[R,C], which are of one stack and one group.

    Returns:
      A function of the carry and C rows, and rows i32[R,C,5]: the numbers in which they differ.
    """
    config = self.config
    first = run[0, 0]
    number, group, rope_dim = config.stacked[first][0], places[first][0], config.rope_dims[first]
    stacks = self.layers if isinstance(self.layers, nnx.List) else [self.layers]
    graph, stack = nnx.split(stacks[number])
    windows = {config.windows[i] for i in run.flat}
    kinds = list(dict.fromkeys(config.ropes[i] for i in run.flat))
    turns = ropes.turns(kinds, positions, rope_dim, length)

    def row(i):
      window = NO_WINDOW if config.windows[i] is None else config.windows[i]
      return i, config.stacked[i][1], places[i][1], window, kinds.index(config.ropes[i])

    def layer(carry, xs):
      (x, state), ((i, place, index, window, kind), params) = carry, xs
      if params is None:
        params = jax.tree.map(lambda x: _at(x, place), stack)
      layer = nnx.merge(graph, params)
      cos, sin = (_at(turn, kind) for turn in turns)
      sinks = layer.self_attn.sinks
      heads, state = attend(
        state, group, index, *layer.qkv(x, cos, sin),
        scale=config.attention_scale, softcap=config.attention_softcap,
        window=window if len(windows) > 1 else config.windows[first],
        sinks=None if sinks is None else sinks[...].astype(jnp.float32),
      )  # fmt: skip
      return layer.finish(x, heads, None if inputs is None else _at(inputs, i)), state

    # A loop over a whole stack takes its slices from the loop, so that its gradient needs no sum.
    params = stack if run.shape == (1, len(config.stacks[number])) else None
    rows = np.array([[row(i) for i in each] for each in run.tolist()], np.int32)
    return lambda carry, rows: _loop(layer, carry, (rows, params)), rows

  def _layer_inputs(self, tokens: jax.Array, x: jax.Array) -> jax.Array | None:
    """What the layers get of each token beside the residual stream, [L,B,P], if anything."""
    config = self.config
    if not config.layer_input_size:
      return None
    shape = (len(tokens), config.num_layers, config.layer_input_size)
    own = self.embed_tokens_per_layer(tokens, config.layer_input_size**0.5).reshape(shape)
    seen = (self.per_layer_model_projection(x) * config.hidden_size**-0.5).reshape(shape)
    return ((self.per_layer_projection_norm(seen) + own) * 2**-0.5).swapaxes(0, 1)


def _stack(config: DecoderConfig, layers: Sequence[int], rngs: nnx.Rngs) -> Layer:
  """The parameters of layers of one shape, each [len(layers), ...]."""

  @nnx.split_rngs(splits=len(layers))
  @nnx.vmap
  def make(rngs):
    return Layer(config, config.layers[layers[0]], rngs=rngs)

  return make(rngs)


def abstract(config: DecoderConfig) -> Decoder:
  """A decoder of shapes and dtypes, without weights."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def _loop(body: Callable, carry: Any, xs: Any) -> Any:
  """`carry` after `body(carry, x)` for each `x` of `xs`. A single step is no loop."""
  if len(jax.tree.leaves(xs)[0]) == 1:
    return body(carry, jax.tree.map(lambda x: x[0], xs))
  return jax.lax.scan(lambda carry, x: (body(carry, x), None), carry, xs)[0]


def _in_turn(bodies: Sequence[Callable], carry: Any, xs: Sequence[Any]) -> Any:
  """`carry` after each body with its x."""
  for body, x in zip(bodies, xs):
    carry = body(carry, x)
  return carry


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
