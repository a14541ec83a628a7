"""Checks of a verb's arguments while it is traced: rank, shape, dtype; never of their values."""

import jax
import jax.numpy as jnp


def integers(name: str, value, shape: tuple[int | None, ...]) -> jax.Array:
  """`value` as an i32 array of `shape`, where None stands for any size."""
  return _array(name, value, shape, jnp.integer, "integer").astype(jnp.int32)


def booleans(name: str, value, shape: tuple[int | None, ...]) -> jax.Array:
  """`value` as a bool array of `shape`."""
  return _array(name, value, shape, jnp.bool_, "bool")


def floats(name: str, value, shape: tuple[int | None, ...]) -> jax.Array:
  """`value` as a floating-point array of `shape`."""
  return _array(name, value, shape, jnp.floating, "floating-point")


def layer(value, num_layers: int) -> jax.Array:
  """A layer index as i32[]; a Python int is checked against the number of layers."""
  if isinstance(value, int):
    if not 0 <= value < num_layers:
      raise ValueError(f"layer must be in [0, {num_layers}), got {value}")
    return jnp.int32(value)
  return integers("layer", value, ())


def _array(name, value, shape, kind, kind_name) -> jax.Array:
  if not hasattr(value, "dtype") or not hasattr(value, "shape"):
    raise ValueError(f"{name} must be an array, got {type(value).__name__} {value!r}")
  if not jnp.issubdtype(value.dtype, kind):
    raise ValueError(f"{name} must have a {kind_name} dtype, got {value.dtype}")
  same = len(value.shape) == len(shape)
  if not (same and all(want in (None, size) for want, size in zip(shape, value.shape))):
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
  return jnp.asarray(value)
