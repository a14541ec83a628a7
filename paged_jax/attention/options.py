"""How attention weighs keys: what a caller of `attend` may ask for, checked, as arrays."""

import dataclasses

import jax
import jax.numpy as jnp

from paged_jax import arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
  """The options of one call of `attend`. All are data: a new value compiles nothing anew."""

  scale: jax.Array  # f32[] factor of the logits
  window: jax.Array  # i32[] tokens that a query sees, itself included; the largest int32 means all
  softcap: jax.Array | None  # f32[] logits become softcap * tanh(logits / softcap); None: unchanged
  sinks: jax.Array | None  # f32[Q] a logit per head that carries no value; None: there are none
  lse: bool = dataclasses.field(default=True, metadata={"static": True})  # whether it is wanted


def make(
  q: jax.Array,
  *,
  scale: float | jax.Array | None = None,
  window: int | jax.Array | None = None,
  softcap: float | jax.Array | None = None,
  sinks: jax.Array | None = None,
  lse: bool = True,
) -> Options:
  """The options for queries [B,Q,D]. None means D**-0.5, the largest int32, and neither of the rest.

  Raises:
    ValueError: A value has a wrong shape or dtype, or is static and out of range.
  """
  _, num_heads, d = q.shape
  if sinks is not None:
    sinks = arguments.floats("sinks", sinks, (num_heads,)).astype(jnp.float32)
  if softcap is not None:
    softcap = _positive("softcap", softcap, jnp.float32)
  return Options(
    scale=_scalar("scale", d**-0.5 if scale is None else scale, jnp.float32),
    window=_positive("window", jnp.iinfo(jnp.int32).max if window is None else window, jnp.int32),
    softcap=softcap,
    sinks=sinks,
    lse=lse,
  )


def _positive(name: str, value, dtype) -> jax.Array:
  """`value` as a scalar array; a static one must be positive, and represented by the dtype."""
  scalar = _scalar(name, value, dtype)
  if not isinstance(value, jax.Array):
    if not value > 0:
      raise ValueError(f"{name} must be positive, got {value}")
    if dtype == jnp.int32 and value != int(value):
      raise ValueError(f"{name} must be an integer, got {value}")
  return scalar


def _scalar(name: str, value, dtype) -> jax.Array:
  if jnp.shape(value):
    raise ValueError(f"{name} must be a scalar, got shape {list(jnp.shape(value))}")
  try:
    return jnp.asarray(value, dtype)
  except OverflowError:
    raise ValueError(f"{name} must fit in {jnp.dtype(dtype)}, got {value}") from None
