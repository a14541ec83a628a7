"""Rotary embeddings: how far each pair of a head turns per token, and the turn itself.

The scalings and their names are those of Hugging Face's `modeling_rope_utils`. D is the head dim.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.models import fields

NAMES = {  # fields of each scaling: their names in `config.json` and ours
  "default": {},
  "linear": {"factor": "factor"},
  "proportional": {"factor": "factor", "partial_rotary_factor": "part"},
  "dynamic": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
  },
  "yarn": {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
  },
  "longrope": {
    "short_factor": "short_factors",
    "long_factor": "long_factors",
    "original_max_position_embeddings": "original_length",
    "attention_factor": "attention_factor",
  },
}
NEEDED = ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding of a layer.

  `linear` slows all pairs, `llama3` and `yarn` only those that turn slowly. `proportional` turns
  only the first pairs. `dynamic` and `longrope` turn differently in texts longer than
  `original_length`. The keys in a cache turn at one speed, so such a cache must end at that length
  (see `max_length`). `Decoder.dense` knows the length of its texts and takes longer ones.

  >>> from paged_jax import models
  >>> models.Rope(base=100.0).frequencies(head_dim=4).round(3).tolist()  # radians per token
  [1.0, 0.10000000149011612]
  """

  scaling: str = "default"  # default, linear, proportional, llama3, yarn, dynamic or longrope
  base: float = 10_000.0
  factor: float = 1.0
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0
  original_length: int = 8192  # tokens before scaling
  attention_factor: float = 1.0  # yarn and longrope: multiplies queries and keys
  beta_fast: float = 32.0  # yarn: turns over the original length, from here on not slowed
  beta_slow: float = 1.0  # and down to here slowed by `factor`
  truncate: bool = True  # these bounds are rounded to whole pairs
  short_factors: tuple[float, ...] = ()  # longrope: per pair, in texts of the original length
  long_factors: tuple[float, ...] = ()  # and in longer ones
  part: float = 1.0  # proportional: share of the pairs that turn

  @property
  def max_length(self) -> int | None:
    """Longest text that a cache may hold, None if any."""
    return self.original_length if self.scaling in ("dynamic", "longrope") else None

  def frequencies(self, head_dim: int, length: int = 0) -> np.ndarray:
    """f32[D/2] radians per token of each pair, in a text of `length` tokens."""
    match self.scaling:
      case "llama3":
        frequencies = _llama3(self, head_dim)
      case "proportional":
        turning = np.arange(head_dim // 2) < int(self.part * head_dim // 2)
        frequencies = np.where(turning, _plain(self.base, head_dim), 0) / self.factor
      case "yarn":
        frequencies = _yarn(self, head_dim)
      case "dynamic":
        frequencies = _plain(_stretched_base(self, head_dim, length), head_dim)
      case "longrope":
        factors = self.long_factors if length > self.original_length else self.short_factors
        frequencies = _plain(self.base, head_dim) / np.array(factors, np.float32)
      case _:
        frequencies = _plain(self.base, head_dim) / self.factor
    return frequencies.astype(np.float32)


def turns(
  ropes: Sequence[Rope], positions: jax.Array, head_dim: int, length: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine f32[R,B,D/2] of the angle of each pair, times the rope's attention factor.

  `positions` i32[B], R ropes; `length` as in `Rope.frequencies`.
  """
  frequencies = np.stack([rope.frequencies(head_dim, length) for rope in ropes])[:, None]
  factors = np.array([[[rope.attention_factor]] for rope in ropes], np.float32)
  angles = positions.astype(jnp.float32)[None, :, None] * frequencies
  return jnp.cos(angles) * factors, jnp.sin(angles) * factors


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (d, d + D/2) of `x` [B,H,D], in float32.

  `cos` and `sin` f32[B,D/2] are one rope's `turns`.
  """
  cos, sin = cos[:, None], sin[:, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def paired(x: jax.Array) -> jax.Array:
  """`x` [...,D] with its pairs (2d, 2d + 1) at (d, d + D/2), where `rotate` takes them."""
  return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def read(stated: dict[str, Any], max_length: int, head_dim: int) -> Rope:
  """The rope that `config.json` states.

  Args:
    stated: Its `rope_parameters`, with `rope_theta`.
    max_length: Its `max_position_embeddings`.
    head_dim: Size of a head.

  Raises:
    ValueError: A field is missing, wrong or not supported; the message names it.
  """
  scaling = stated.get("rope_type", stated.get("type", "default"))
  if not isinstance(scaling, str) or scaling not in NAMES:
    known = ", ".join(NAMES)
    raise ValueError(f"rope_type: rope scaling {scaling!r} is not supported, only {known}")
  if scaling == "proportional":
    stated = {"factor": 1.0} | stated
  for name in NEEDED:
    if name in NAMES[scaling] and name not in stated:
      raise ValueError(f"rope scaling {scaling!r} needs {name}")
  rope = Rope(scaling, fields.number(stated, "rope_theta", above=1))
  if scaling == "default":
    return rope
  part = fields.number({"partial_rotary_factor": 1} | stated, "partial_rotary_factor")
  if scaling != "proportional" and int(head_dim * part) != head_dim:
    raise fields.wrong("partial_rotary_factor", f"1 with rope scaling {scaling!r}", part)
  stated = {"original_max_position_embeddings": max_length} | stated
  return dataclasses.replace(rope, **READERS[scaling](stated, max_length, head_dim))


def write(rope: Rope) -> dict[str, Any]:
  """The `rope_parameters` of `config.json`; `read` is its inverse."""
  values = {theirs: getattr(rope, ours) for theirs, ours in NAMES[rope.scaling].items()}
  values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
  return {"rope_type": rope.scaling, "rope_theta": rope.base} | values


def _read_linear(stated: dict[str, Any], max_length: int, head_dim: int) -> dict[str, Any]:
  del max_length, head_dim
  return {"factor": fields.number(stated, "factor")}


def _read_proportional(stated: dict[str, Any], max_length: int, head_dim: int) -> dict[str, Any]:
  del max_length, head_dim
  part = fields.number({"partial_rotary_factor": 1} | stated, "partial_rotary_factor")
  if part > 1:
    raise fields.wrong("partial_rotary_factor", "at most 1", part)
  return {"factor": fields.number(stated, "factor"), "part": part}


def _read_dynamic(stated: dict[str, Any], max_length: int, head_dim: int) -> dict[str, Any]:
  """`dynamic` always takes the length of the model as the original one."""
  if head_dim == 2:
    raise fields.wrong("head_dim", "above 2 with rope scaling 'dynamic'", head_dim)
  return {"factor": fields.number(stated, "factor"), "original_length": max_length}


def _read_llama3(stated: dict[str, Any], max_length: int, head_dim: int) -> dict[str, Any]:
  del max_length, head_dim
  low, high = (fields.number(stated, f"{name}_freq_factor") for name in ("low", "high"))
  if low >= high:
    raise fields.wrong("high_freq_factor", f"above low_freq_factor={low:g}", high)
  return {
    "factor": fields.number(stated, "factor"),
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_length": fields.whole(stated, "original_max_position_embeddings"),
  }


def _read_yarn(stated: dict[str, Any], max_length: int, head_dim: int) -> dict[str, Any]:
  """Models of DeepSeek state both `mscale`s. A null field, or 0 in these four, means the default."""
  del head_dim
  names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
  stated = stated | {name: stated.get(name) or None for name in names}
  original = fields.whole(stated, "original_max_position_embeddings")
  factor = _optional(stated, "factor") or max_length / original
  one, every = _optional(stated, "mscale"), _optional(stated, "mscale_all_dim")
  inferred = mscale(factor, 1.0)
  if one and every:
    inferred = mscale(factor, one) / mscale(factor, every)
  return {
    "factor": factor,
    "original_length": original,
    "attention_factor": _optional(stated, "attention_factor") or inferred,
    "beta_fast": _optional(stated, "beta_fast") or 32.0,
    "beta_slow": _optional(stated, "beta_slow") or 1.0,
    "truncate": stated.get("truncate", True) is not None
    and fields.flag({"truncate": True} | stated, "truncate"),
  }


def _read_longrope(stated: dict[str, Any], max_length: int, head_dim: int) -> dict[str, Any]:
  original = fields.whole(stated, "original_max_position_embeddings", low=2)
  factor = _optional(stated, "factor") or max_length / original
  inferred = math.sqrt(1 + max(0.0, math.log(factor)) / math.log(original))
  return {
    "short_factors": fields.numbers(stated, "short_factor", head_dim // 2, "pair of head_dim"),
    "long_factors": fields.numbers(stated, "long_factor", head_dim // 2, "pair of head_dim"),
    "original_length": original,
    "attention_factor": _optional(stated, "attention_factor") or inferred,
  }


def _optional(stated: dict[str, Any], name: str) -> float | None:
  """A number, or None if it is missing or null."""
  return None if stated.get(name) is None else fields.number(stated, name)


def mscale(factor: float, mscale: float) -> float:
  """What yarn multiplies queries and keys by, for texts longer by `factor`."""
  return 0.1 * mscale * max(0.0, math.log(factor)) + 1


def _plain(base: float, head_dim: int) -> np.ndarray:
  """f32[D/2] without scaling."""
  return 1 / base ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


def _llama3(rope: Rope, head_dim: int) -> np.ndarray:
  """f32[D/2], divided by the factor if a pair turns slowly, blended in between."""
  plain = _plain(rope.base, head_dim)
  turns = rope.original_length * plain / (2 * math.pi)  # over the original length
  kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
  kept = np.clip(kept, 0, 1)
  return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: Rope, head_dim: int) -> np.ndarray:
  """f32[D/2] like `_llama3`, blended by the index of the pair (https://arxiv.org/abs/2309.00071)."""
  plain = _plain(rope.base, head_dim)
  low, high = (_pair_with(rope, head_dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  width = (high - low) or 0.001
  slowed = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
  return plain / rope.factor * slowed + plain * (1 - slowed)


def _pair_with(rope: Rope, head_dim: int, turns: float) -> float:
  """Index, not whole, of the pair that turns this often over the original length."""
  span = rope.original_length / (turns * 2 * math.pi)
  return head_dim * math.log(span) / (2 * math.log(rope.base))


def _stretched_base(rope: Rope, head_dim: int, length: int) -> float:
  """Base of `dynamic`: it grows with texts beyond the original length."""
  if length <= rope.original_length:
    return rope.base
  growth = rope.factor * length / rope.original_length - (rope.factor - 1)
  return rope.base * growth ** (head_dim / (head_dim - 2))


READERS = {
  "linear": _read_linear,
  "proportional": _read_proportional,
  "dynamic": _read_dynamic,
  "llama3": _read_llama3,
  "yarn": _read_yarn,
  "longrope": _read_longrope,
}
