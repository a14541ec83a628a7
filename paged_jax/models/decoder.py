"""One decoder for the Llama, Mistral, Qwen and Gemma families, on the paged cache or dense.

Modules and parameters are named and shaped as in Hugging Face checkpoints (weights are [out, in]),
so the path of a parameter is the name of its tensor. Layers are stacked along a leading axis.

Axis letters besides the cache's: M sequences of C tokens, E hidden size, V vocabulary.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paged_jax import cache as cache_lib
from paged_jax.models import ropes
from paged_jax.models.ropes import Rope
from paged_jax.types import Cache, Plan

NO_WINDOW = np.iinfo(np.int32).max
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Everything that varies between families. Frozen and hashable.

  Raises:
    ValueError: Fields do not fit together; the message names them.

  >>> from paged_jax import models
  >>> config = models.DecoderConfig(
  ...   vocab_size=50, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
  ...   num_kv_heads=1, head_dim=4, max_length=64, windows=(None,), ropes=(models.Rope(),),
  ... )
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_length: int  # longest text: what the model was trained for, or its ropes hold in a cache
  windows: tuple[int | None, ...]  # per layer: tokens seen, itself included; None = all
  ropes: tuple[Rope, ...]  # per layer
  activation: str = "silu"  # silu or gelu_tanh
  norm_eps: float = 1e-6
  norm_offset: bool = False  # RMSNorm multiplies by 1 + weight (Gemma)
  post_norms: bool = False  # attention and MLP outputs are normalised too (Gemma)
  qk_norm: bool = False  # queries and keys are normalised per head (Qwen3, Gemma 3)
  qkv_bias: bool = False  # Qwen2
  tied: bool = False  # logits reuse the embedding
  embed_scale: float = 1.0
  attention_scale: float | None = None  # None = head_dim**-0.5
  attention_softcap: float | None = None
  logit_softcap: float | None = None

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}")
    if self.head_dim % 2:
      raise ValueError(f"{self.head_dim=} must be even")
    if not len(self.windows) == len(self.ropes) == self.num_layers:
      raise ValueError(f"windows and ropes must have {self.num_layers=} entries")


class Linear(nnx.Module):
  """A dense projection, with or without bias."""

  def __init__(self, in_size: int, out_size: int, *, bias: bool = False, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)
    self.weight = nnx.Param(init(rngs.params(), (out_size, in_size), jnp.float32))
    self.bias = nnx.Param(jnp.zeros(out_size)) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` [B,in] to [B,out]."""
    x = jnp.einsum("bi,oi->bo", x, self.weight[...])
    return x if self.bias is None else x + self.bias[...][None]


class Norm(nnx.Module):
  """RMSNorm over the last axis, in float32."""

  def __init__(self, size: int, config: DecoderConfig):
    self.weight = nnx.Param(jnp.zeros(size) if config.norm_offset else jnp.ones(size))
    self.eps, self.offset = config.norm_eps, config.norm_offset

  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` [...,size], normalised and weighted."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    weight = jnp.broadcast_to(self.weight[...], x.shape)
    if self.offset:  # Gemma rounds after the weight, the others before it
      return (wide * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * weight


class Attention(nnx.Module):
  """The projections around attention."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    hidden, dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
    self.q_proj = Linear(hidden, config.num_heads * dim, bias=bias, rngs=rngs)
    self.k_proj = Linear(hidden, config.num_kv_heads * dim, bias=bias, rngs=rngs)
    self.v_proj = Linear(hidden, config.num_kv_heads * dim, bias=bias, rngs=rngs)
    self.o_proj = Linear(config.num_heads * dim, hidden, rngs=rngs)
    self.q_norm = Norm(dim, config) if config.qk_norm else None
    self.k_norm = Norm(dim, config) if config.qk_norm else None
    self.head_dim = dim

  def qkv(
    self, x: jax.Array, cos: jax.Array, sin: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [B,Q,D] and keys [B,H,D], and values [B,H,D]."""
    projections = (self.q_proj, self.k_proj, self.v_proj)
    # Without the barrier XLA on TPU moves the reshape to the weights, and copies them out of the
    # stack of all layers first: 0.80 instead of 0.66 million cycles for a layer of Llama-3-8B.
    q, k, v = jax.lax.optimization_barrier(tuple(project(x) for project in projections))
    q, k, v = (x.reshape(len(x), -1, self.head_dim) for x in (q, k, v))
    if self.q_norm and self.k_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    return ropes.rotate(q, cos, sin), ropes.rotate(k, cos, sin), v


class MLP(nnx.Module):
  """Gated MLP."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.gate_proj = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
    self.up_proj = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
    self.down_proj = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
    self.activation = config.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` [B,E] to [B,E]."""
    return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
  """One layer without its attention, which the caller puts between `qkv` and `finish`."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.input_layernorm = Norm(config.hidden_size, config)
    self.self_attn = Attention(config, rngs=rngs)
    self.post_attention_layernorm = Norm(config.hidden_size, config)
    self.pre_feedforward_layernorm = Norm(config.hidden_size, config) if config.post_norms else None
    self.post_feedforward_layernorm = (
      Norm(config.hidden_size, config) if config.post_norms else None
    )
    self.mlp = MLP(config, rngs=rngs)

  def qkv(
    self, x: jax.Array, cos: jax.Array, sin: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of the residual stream `x` [B,E]; see `ropes.rotate`."""
    return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

  def finish(self, x: jax.Array, heads: jax.Array) -> jax.Array:
    """The residual stream after this layer, whose attention gave `heads` [B,Q,D]."""
    out = self.self_attn.o_proj(heads.reshape(len(x), -1))
    if self.pre_feedforward_layernorm and self.post_feedforward_layernorm:
      x = x + self.post_attention_layernorm(out)
      return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
    x = x + out  # here "post attention" names the norm before the MLP
    return x + self.mlp(self.post_attention_layernorm(x))


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

  def __call__(self, tokens: jax.Array, cache: Cache, plan: Plan) -> tuple[jax.Array, Cache]:
    """Runs one ragged batch, whose keys and values join the cache.

    Args:
      tokens: i32[B] tokens at the plan's rows and positions.
      cache: A cache with room for them (`extend` first).
      plan: From `paged_jax.plan(cache, rows, positions)`.

    Returns:
      The final hidden states [B,E], for `logits` of the tokens that need them, and the cache.
    """

    def attend(cache, layer, window, q, k, v):
      cache = cache_lib.write(cache, layer, k, v, plan)
      heads = cache_lib.attend(
        cache, layer, q, plan, scale=self.config.attention_scale, window=window,
        softcap=self.config.attention_softcap,
      )  # fmt: skip
      return heads, cache

    return self._run(tokens, plan.positions, attend, cache)

  def dense(self, tokens: jax.Array) -> jax.Array:
    """Runs whole sequences without a cache, for training.

    Args:
      tokens: i32[M,C] tokens, from position 0 on. Ropes that depend on the length of a text
        (`dynamic`, `longrope`) turn as in a text of C tokens.

    Returns:
      f32[M,C,V] logits.
    """

    def attend(state, layer, window, q, k, v):
      del layer
      return attention(q, k, v, window, self.config), state

    def run(tokens):
      x, _ = self._run(tokens, jnp.arange(len(tokens)), attend, None, length=len(tokens))
      return self.logits(x)

    return jax.vmap(run)(tokens)

  def logits(self, x: jax.Array) -> jax.Array:
    """f32[B,V] logits of hidden states [B,E]."""
    head = self.embed_tokens if self.lm_head is None else self.lm_head
    logits = jnp.einsum("be,ve->bv", x, head.weight[...], preferred_element_type=jnp.float32)
    cap = self.config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def _run(self, tokens, positions, attend, state, length=0):
    """Embeds, scans the layers with `attend(state, layer, window, q, k, v)`, normalises."""
    config = self.config
    graph, layers = nnx.split(self.layers)
    windows = None  # None: every layer sees all tokens
    if any(config.windows):
      windows = jnp.array([NO_WINDOW if w is None else w for w in config.windows], jnp.int32)
    distinct = list(dict.fromkeys(config.ropes))  # most models have one for all layers, or two
    turns = ropes.turns(distinct, positions, config.head_dim, length)
    kinds = jnp.array([distinct.index(rope) for rope in config.ropes], jnp.int32)

    def body(carry, xs):
      index, x, state = carry
      layer, window, kind = xs
      layer = nnx.merge(graph, layer)
      cos, sin = (jax.lax.dynamic_index_in_dim(turn, kind, keepdims=False) for turn in turns)
      heads, state = attend(state, index, window, *layer.qkv(x, cos, sin))
      return (index + 1, layer.finish(x, heads), state), None

    x = self.embed_tokens.weight.at[tokens].get(mode="fill")  # no such token: NaN
    x = x * jnp.asarray(config.embed_scale, x.dtype)  # rounded as the weights are (Gemma)
    (_, x, state), _ = jax.lax.scan(body, (jnp.int32(0), x, state), (layers, windows, kinds))
    return self.norm(x), state


def abstract(config: DecoderConfig) -> Decoder:
  """A decoder of shapes and dtypes, without weights."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array | None, config: DecoderConfig
) -> jax.Array:
  """Causal attention of queries [C,Q,D] to keys and values [C,H,D], softmax in float32."""
  c, h, d = k.shape
  scale = d**-0.5 if config.attention_scale is None else config.attention_scale
  q = q.reshape(c, h, -1, d)
  logits = jnp.einsum("qhgd,khd->hgqk", q, k, preferred_element_type=jnp.float32) * scale
  if config.attention_softcap is not None:
    logits = config.attention_softcap * jnp.tanh(logits / config.attention_softcap)
  age = jnp.arange(c)[:, None] - jnp.arange(c)[None]  # of each key, seen from each query
  visible = age >= 0 if window is None else (age >= 0) & (age < window)
  weights = jax.nn.softmax(jnp.where(visible[None, None], logits, -jnp.inf), axis=-1)
  return jnp.einsum("hgqk,khd->qhgd", weights.astype(v.dtype), v).reshape(c, -1, d)
