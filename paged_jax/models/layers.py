"""The parts of a decoder's layer.

Modules and parameters are named and shaped as in Hugging Face checkpoints (weights are [out, in]),
so the path of a parameter is the name of its tensor.

Axis letters besides the cache's: E hidden size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from paged_jax.models import ropes
from paged_jax.models.config import DecoderConfig, Experts, Latent, Shape

# Queries, keys and values. No keys: those of another layer. No values: they are in the keys.
QKV = tuple[jax.Array, jax.Array | None, jax.Array | None]
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


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
    self.eps, self.offset, self.wide = config.norm_eps, config.norm_offset, config.norm_wide

  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` [...,size], normalised and weighted."""
    wide = _normalised(x, self.eps)
    weight = jnp.broadcast_to(self.weight[...], x.shape)
    if self.wide:
      weight = weight.astype(jnp.float32)
      return (wide * (1 + weight if self.offset else weight)).astype(x.dtype)
    return wide.astype(x.dtype) * weight


def _normalised(x: jax.Array, eps: float) -> jax.Array:
  """`x` in float32, with a mean square of 1 over the last axis."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class Attention(nnx.Module):
  """The projections around attention."""

  def __init__(self, config: DecoderConfig, shape: Shape, *, rngs: nnx.Rngs):
    hidden, dim = config.hidden_size, shape.head_dim
    linear = partial(Linear, hidden, bias=config.qkv_bias, rngs=rngs)
    self.q_proj = linear(config.num_heads * dim)
    self.k_proj = linear(shape.num_kv_heads * dim) if shape.own else None
    self.v_proj = linear(shape.num_kv_heads * dim) if shape.own and shape.values else None
    self.o_proj = Linear(config.num_heads * dim, hidden, bias=config.output_bias, rngs=rngs)
    self.sinks = nnx.Param(jnp.zeros(config.num_heads)) if config.sinks else None
    self.q_norm = Norm(dim, config) if config.qk_norm else None
    self.k_norm = Norm(dim, config) if config.qk_norm and shape.own else None
    self.head_dim = dim
    self.value_eps = config.norm_eps if config.value_norm else None

  def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> QKV:
    """Rotated queries [B,Q,D] and keys [B,H,D], and values [B,H,D]."""
    projections = [each for each in (self.q_proj, self.k_proj, self.v_proj) if each]
    # Without the barrier XLA on TPU moves the reshape to the weights, and copies them out of the
    # stack of all layers first: 0.80 instead of 0.66 million cycles for a layer of Llama-3-8B.
    q, *kv = jax.lax.optimization_barrier([project(x) for project in projections])
    q, *kv = (x.reshape(len(x), -1, self.head_dim) for x in (q, *kv))
    q = ropes.rotate(self.q_norm(q) if self.q_norm else q, cos, sin)
    if not kv:
      return q, None, None
    k, v = kv[0], kv[-1]  # one and the same if there is no `v_proj`
    k = ropes.rotate(self.k_norm(k) if self.k_norm else k, cos, sin)
    if self.value_eps is not None:
      v = _normalised(v, self.value_eps).astype(v.dtype)
    return q, k, v

  def out(self, heads: jax.Array) -> jax.Array:
    """[B,E] of what attention gives, `heads` [B,Q,D]."""
    return self.o_proj(heads.reshape(len(heads), -1))


class LatentAttention(nnx.Module):
  """The projections around latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1).

  Each head's key and value are projections of the token's vector c, the key with a part r that all
  heads share. What is cached is c and r; the projections move to the queries and to the outputs:

      # logit    (q, p) . (K c, r)  =  (K' q, p) . (c, r)       so queries have as many channels
      # output   sum of w (V c)     =  V (sum of w c)           and a value is c itself
  """

  def __init__(self, config: DecoderConfig, latent: Latent, *, rngs: nnx.Rngs):
    hidden, heads = config.hidden_size, config.num_heads
    query_dim = heads * (latent.key_dim + latent.rope_dim)
    inner = dataclasses.replace(config, norm_eps=1e-6)  # whatever the other norms have
    if latent.query_rank is None:
      self.q_proj = Linear(hidden, query_dim, rngs=rngs)
    else:
      self.q_a_proj = Linear(hidden, latent.query_rank, rngs=rngs)
      self.q_a_layernorm = Norm(latent.query_rank, inner)
      self.q_b_proj = Linear(latent.query_rank, query_dim, rngs=rngs)
    self.kv_a_proj_with_mqa = Linear(hidden, latent.rank + latent.rope_dim, rngs=rngs)
    self.kv_a_layernorm = Norm(latent.rank, inner)
    self.kv_b_proj = Linear(latent.rank, heads * (latent.key_dim + latent.value_dim), rngs=rngs)
    self.o_proj = Linear(heads * latent.value_dim, hidden, rngs=rngs)
    self.sinks = None
    self.sizes, self.num_heads = latent, heads

  def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> QKV:
    """Queries [B,Q,rank+rope_dim] for the keys [B,1,rank+rope_dim], whose first part is the value."""
    sizes = self.sizes
    if sizes.query_rank is None:
      q = self.q_proj(x)
    else:
      q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
    q, q_turning = jnp.split(q.reshape(len(x), self.num_heads, -1), [sizes.key_dim], axis=-1)
    k, k_turning = jnp.split(self.kv_a_proj_with_mqa(x)[:, None], [sizes.rank], axis=-1)
    if sizes.interleaved:
      q_turning, k_turning = ropes.paired(q_turning), ropes.paired(k_turning)
    q_turning, k_turning = (ropes.rotate(x, cos, sin) for x in (q_turning, k_turning))
    q = jnp.einsum("bqd,qdc->bqc", q, self._up()[:, : sizes.key_dim])
    q = jnp.concatenate([q, q_turning], axis=-1)
    return q, jnp.concatenate([self.kv_a_layernorm(k), k_turning], axis=-1), None

  def out(self, heads: jax.Array) -> jax.Array:
    """[B,E] of what attention gives, `heads` [B,Q,rank]."""
    heads = jnp.einsum("bqc,qdc->bqd", heads, self._up()[:, self.sizes.key_dim :])
    return self.o_proj(heads.reshape(len(heads), -1))

  def _up(self) -> jax.Array:
    """[Q,key_dim+value_dim,rank] projections of the vector to each head's key and value."""
    return self.kv_b_proj.weight[...].reshape(self.num_heads, -1, self.sizes.rank)


class MLP(nnx.Module):
  """Gated MLP."""

  def __init__(self, config: DecoderConfig, size: int, *, rngs: nnx.Rngs):
    self.gate_proj = Linear(config.hidden_size, size, rngs=rngs)
    self.up_proj = Linear(config.hidden_size, size, rngs=rngs)
    self.down_proj = Linear(size, config.hidden_size, rngs=rngs)
    self.activation = config.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` [B,E] to [B,E]."""
    return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class ExpertWeights(nnx.Module):
  """The weights of all experts, [in, out]; gates and values alternate."""

  def __init__(self, config: DecoderConfig, num_experts: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
    hidden, size = config.hidden_size, config.intermediate_size
    up, down = (num_experts, hidden, 2 * size), (num_experts, size, hidden)
    self.gate_up_proj = nnx.Param(init(rngs.params(), up, jnp.float32))
    self.gate_up_proj_bias = nnx.Param(jnp.zeros((num_experts, 2 * size)))
    self.down_proj = nnx.Param(init(rngs.params(), down, jnp.float32))
    self.down_proj_bias = nnx.Param(jnp.zeros((num_experts, hidden)))


class ExpertMLP(nnx.Module):
  """A weighted sum of the experts that the router has for a token."""

  def __init__(self, config: DecoderConfig, experts: Experts, *, rngs: nnx.Rngs):
    self.router = Linear(config.hidden_size, experts.num_experts, bias=True, rngs=rngs)
    self.experts = ExpertWeights(config, experts.num_experts, rngs=rngs)
    self.sizes = experts

  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` [B,E] to [B,E]."""
    logits, chosen = jax.lax.top_k(self.router(x), self.sizes.per_token)
    order = jnp.argsort(chosen.reshape(-1))  # tokens of one expert side by side
    expert = chosen.reshape(-1)[order]
    counts = jnp.zeros(self.sizes.num_experts, jnp.int32).at[expert].add(1)
    weights = self.experts

    def project(x, weight, bias):
      return jax.lax.ragged_dot(x, weight, counts) + bias[expert]

    x = x[order // self.sizes.per_token]
    x = project(x, weights.gate_up_proj[...], weights.gate_up_proj_bias[...])
    gate = jnp.minimum(x[:, ::2], self.sizes.limit)
    x = jnp.clip(x[:, 1::2], -self.sizes.limit, self.sizes.limit)
    x = (x + 1) * gate * jax.nn.sigmoid(self.sizes.gain * gate)
    x = project(x, weights.down_proj[...], weights.down_proj_bias[...])
    x = x[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("bk,bke->be", jax.nn.softmax(logits, axis=-1), x)


class Layer(nnx.Module):
  """One layer without its attention, which the caller puts between `qkv` and `finish`."""

  def __init__(self, config: DecoderConfig, shape: Shape, *, rngs: nnx.Rngs):
    hidden, size = config.hidden_size, config.layer_input_size
    norm = partial(Norm, hidden, config)
    self.input_layernorm = norm()
    if config.latent:
      self.self_attn = LatentAttention(config, config.latent, rngs=rngs)
    else:
      self.self_attn = Attention(config, shape, rngs=rngs)
    self.post_attention_layernorm = norm()
    self.pre_feedforward_layernorm = norm() if config.post_norms else None
    self.post_feedforward_layernorm = norm() if config.post_norms else None
    if config.experts:
      self.mlp = ExpertMLP(config, config.experts, rngs=rngs)
    else:
      self.mlp = MLP(config, shape.intermediate_size, rngs=rngs)
    self.per_layer_input_gate = Linear(hidden, size, rngs=rngs) if size else None
    self.per_layer_projection = Linear(size, hidden, rngs=rngs) if size else None
    self.post_per_layer_input_norm = norm() if size else None
    self.layer_scalar = nnx.Variable(jnp.ones(1)) if config.layer_scalars else None
    self.activation = config.activation

  def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> QKV:
    """Queries, keys and values of the residual stream `x` [B,E]; see `ropes.rotate`."""
    return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

  def finish(self, x: jax.Array, heads: jax.Array, extra: jax.Array | None = None) -> jax.Array:
    """The residual stream after this layer.

    `heads` [B,Q,D] are what its attention gave, `extra` [B,P] are its inputs of the tokens.
    """
    out = self.self_attn.out(heads)
    if self.pre_feedforward_layernorm and self.post_feedforward_layernorm:
      x = x + self.post_attention_layernorm(out)
      x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
    else:  # here "post attention" names the norm before the MLP
      x = x + out
      x = x + self.mlp(self.post_attention_layernorm(x))
    if self.per_layer_input_gate and self.per_layer_projection and self.post_per_layer_input_norm:
      out = ACTIVATIONS[self.activation](self.per_layer_input_gate(x)) * extra
      x = x + self.post_per_layer_input_norm(self.per_layer_projection(out))
    return x if self.layer_scalar is None else x * self.layer_scalar[...][None]
