"""Checks of the arguments of a verb while it is traced: rank, shape and dtype, never values."""

import operator

import jax
import jax.numpy as jnp
import numpy as np


def integers(name: str, value, shape: tuple[int | None, ...]) -> jax.Array:
  """`value` as an i32 array of `shape`, where None is any size except 0."""
  _check_range(name, value)
  _check(name, value, shape, jnp.integer, "an integer")
  return jnp.asarray(value).astype(jnp.int32)


def booleans(name: str, value, shape: tuple[int | None, ...]) -> jax.Array:
  """`value` as a bool array of `shape`."""
  _check(name, value, shape, jnp.bool_, "a bool")
  return jnp.asarray(value)


def floats(name: str, value, shape: tuple[int | None, ...]) -> jax.Array:
  """`value` as a floating-point array of `shape`."""
  _check(name, value, shape, jnp.floating, "a floating-point")
  return jnp.asarray(value)


def host_integers(name: str, value, shape: tuple[int | None, ...]) -> np.ndarray:
  """As `integers`, but an array of NumPy."""
  _check(name, value, shape, np.integer, "an integer")
  if value.dtype == np.int32:
    return np.asarray(value)
  _check_range(name, value)
  return np.asarray(value).astype(np.int32)


def host_booleans(name: str, value, shape: tuple[int | None, ...]) -> np.ndarray:
  """As `booleans`, but an array of NumPy."""
  _check(name, value, shape, np.bool_, "a bool")
  return np.asarray(value)


def layer(value, num_layers: int) -> jax.Array:
  """A layer index as i32[]. A number out of range raises; an array becomes `num_layers`."""
  if isinstance(value, int | np.integer):
    if not 0 <= value < num_layers:
      raise ValueError(f"layer must be in [0, {num_layers}), got {value}")
    return jnp.int32(value)
  value = integers("layer", value, ())
  return jnp.where((value >= 0) & (value < num_layers), value, num_layers)


def size(name: str, value, limit: int) -> int:
  """A static size in 1..limit."""
  if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
    raise ValueError(f"{name} must be an integer in [1, {limit}], got {value!r}")
  return value


def parts(value, num_tokens: int) -> list[tuple[int, int, int]]:
  """Tokens, most rows and longest row of each part of `num_tokens` tokens, static numbers."""
  try:
    made = [_part(*map(operator.index, part)) for part in value]
  except TypeError:
    raise ValueError(f"parts must be pairs of tokens and rows, got {value!r}") from None
  if any(min(part) < 1 for part in made):
    raise ValueError(f"parts must have at least one token and one row each, got {value!r}")
  if (total := sum(tokens for tokens, _, _ in made)) != num_tokens:
    raise ValueError(f"parts must have the batch's {num_tokens} tokens, got {total} in {value!r}")
  return made


def _part(tokens: int, rows: int, longest: int | None = None) -> tuple[int, int, int]:
  """`longest`, by default the average."""
  return tokens, rows, -(-tokens // max(rows, 1)) if longest is None else longest


def _check_range(name, value) -> None:
  if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
    strange = value[value != value.astype(np.int32)]
    if strange.size:
      raise ValueError(f"{name} must fit in int32, got {strange[0]}")


def _check(name, value, shape, kind, kind_name) -> None:
  if not hasattr(value, "dtype") or not hasattr(value, "shape"):
    raise ValueError(f"{name} must be an array, got {type(value).__name__} {value!r}")
  if not jnp.issubdtype(value.dtype, kind):
    raise ValueError(f"{name} must have {kind_name} dtype, got {value.dtype}")
  same = len(value.shape) == len(shape)
  if not (same and all(n == want or (want is None and n) for want, n in zip(shape, value.shape))):
    wanted = ", ".join("any" if want is None else str(want) for want in shape)
    raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
