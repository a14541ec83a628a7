"""Keys and values of sequences, written and read by the host; in canary mode with marks.

Canary mode adds one layer. In it each written slot has a mark: its key spells the token's
position, and its value spells the cache id of the sequence that wrote it, in digits that every
dtype represents exactly. Marks move with their pages.

    # 16 bits, base 128    position 300   [44 2 0 0 | 44 2 0 0]
    # 8 bits, base 8       position 300   [7 4 5 4 0 0 ...]        7 is the largest: the scale's
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.config import CacheConfig
from paged_jax.host import errors
from paged_jax.host.config import whole
from paged_jax.host.sequences import Handle, Sequences
from paged_jax.host.sharing import Sharing
from paged_jax.host.state import ID_SIZES, bucket

_BASE, _DIGITS = 128, 4
_SMALL_BASE, _SMALL_DIGITS = 8, 10  # of 8 bits, behind the largest digit; read to the next integer


class Tensors:
  """Bodies of write_kv and read_kv. Not thread-safe.

  Args:
    sequences: The live sequences.
    sharing: Copies shared pages before a write.
  """

  def __init__(self, sequences: Sequences, sharing: Sharing):
    self._sequences, self._sharing, self._turn = sequences, sharing, sequences.turn
    self._configs, self._state = self._turn.configs, self._turn.state
    self._canary = self._turn.options.canary

  def layer(self, layer: int, group: int) -> tuple[int, int]:
    """The numbers of a layer and of its group as ints; raises if there is no such layer."""
    group = self._sequences.group(group)
    num_layers = self._configs[group].num_layers
    if not 0 <= whole("layer", layer) < num_layers:
      raise ValueError(f"layer must be in [0, {num_layers}), got {layer}")
    return int(layer), group

  def checked(self, group: int, k: Any, v: Any) -> tuple[jax.Array, jax.Array | None]:
    """Keys and values as [B,H,D]; raises if they do not fit the pool."""
    config = self._configs[group]
    if (v is None) != (config.value_dim is not None):
      wanted = "None, since values are part of keys" if v is not None else "an array"
      raise errors.ShapeMismatch("v", wanted, type(v).__name__)
    shape = (config.num_kv_heads, config.head_dim)
    given = {name: x for name, x in (("k", k), ("v", v)) if x is not None}
    given = {
      name: jnp.asarray(x)[None] if jnp.ndim(x) == 2 else jnp.asarray(x)
      for name, x in given.items()
    }
    k, v = given["k"], given.get("v")
    for name, x in given.items():
      if x.ndim != 3 or x.shape[1:] != shape or x.shape[0] != k.shape[0] or not x.shape[0]:
        raise errors.ShapeMismatch(name, ("B", *shape), x.shape)
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise errors.ShapeMismatch(name, "floating-point", x.dtype)
    return k, v

  def write(
    self,
    handle: Handle,
    group: int,
    layer: int,
    position: int,
    k: jax.Array,
    v: jax.Array | None,
  ) -> None:
    """Writes keys and values [B,H,D] into the slots of the tokens from `position` on."""
    config, state, count = self._configs[group], self._state, k.shape[0]
    row = self._range(handle, group, position, count)
    self._sharing.own(handle, position)
    size = bucket(count, ID_SIZES)
    size *= -(-count // size)
    rows, positions = np.full(size, config.num_rows, np.int32), np.zeros(size, np.int32)
    rows[:count], positions[:count] = row, position + np.arange(count)
    pad = ((0, size - count), (0, 0), (0, 0))
    cache = state.cache_of(group)
    plan = state.verbs.plan(cache, rows, positions)
    padded = [x if x is None else jnp.pad(x.astype(config.value_dtype), pad) for x in (k, v)]
    cache = state.verbs.write(cache, jnp.int32(layer), *padded, plan)
    if self._canary:
      marks = _marks(handle.cache_id, positions, config)
      cache = state.verbs.write(cache, jnp.int32(config.num_layers), *marks, plan)
      writers = self._writers(handle, group)
      writers += [None] * (position + count - len(writers))
      writers[position : position + count] = [handle.cache_id] * count
    state.replace(group, cache)

  def read(
    self, handle: Handle, group: int, layer: int, start: int, num_tokens: int
  ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Starts a read; returns a function that waits for keys and values [num_tokens,H,D]."""
    row, config, state = (
      self._range(handle, group, start, num_tokens),
      self._configs[group],
      self._state,
    )
    rows, cache = np.array([row], np.int32), state.cache_of(group)
    gathered = state.verbs.gather(cache, jnp.int32(layer), rows)
    marks = state.verbs.gather(cache, jnp.int32(config.num_layers), rows) if self._canary else None
    writers = self._writers(handle, group)[start : start + num_tokens]
    pages = state.ledger.groups[group].block_tables[row].copy()
    part = slice(start, start + num_tokens)

    def wait() -> tuple[np.ndarray, np.ndarray]:
      if marks is not None:
        token = _mismatch(writers, start, config, *(np.asarray(x[0, part]) for x in marks))
        if token is not None:
          page = int(pages[token // config.page_size])
          raise errors.CanaryMismatch(handle.request_id, token, page)
      k, v = (np.asarray(x[0, part]) for x in gathered)
      return k, v

    return wait

  def _writers(self, handle: Handle, group: int) -> list[int | None]:
    """The cache id that wrote each token; empty after a report, since programs write no marks."""
    if handle.marked_at != self._state.num_reports or not handle.writers:
      handle.writers = [[] for _ in self._configs]
      handle.marked_at = self._state.num_reports
    return handle.writers[group]

  def _range(self, handle: Handle, group: int, start: int, count: int) -> int:
    """The sequence's row; raises unless a group holds `count` of its tokens from `start` on."""
    row = self._sequences.running(handle)
    begin, end = self._sequences.starts(row)[group], self._sequences.length(handle)
    for token in (start, start + count - 1):
      if not begin <= token < end or count < 1:
        raise self._sequences.unmapped(handle, token, group)
    return row


def _marks(
  cache_id: int, positions: np.ndarray, config: CacheConfig
) -> tuple[np.ndarray, np.ndarray | None]:
  """Keys and values [B,H,D] that mark tokens at `positions` i32[B] as written by `cache_id`.

  Where values are part of keys, the key has digits of both, in turn.
  """
  shape = (len(positions), config.num_kv_heads, config.head_dim)
  texts = [_spelled(x, config) for x in (positions, np.full_like(positions, cache_id))]
  if config.value_dim is not None:
    digits = _SMALL_DIGITS if config.num_scales else _DIGITS
    first = np.arange(config.head_dim) // digits % 2 == 0
    texts = [np.where(first, *texts)]
  k, *v = (np.broadcast_to(x[:, None], shape).astype(config.value_dtype) for x in texts)
  return k, v[0] if v else None


def _mismatch(
  writers: Sequence[int | None], start: int, config: CacheConfig, k: np.ndarray, v: np.ndarray
) -> int | None:
  """The first token from `start` on whose mark [B,H,D] is not that of its writer, or None."""
  for i, writer in enumerate(writers):
    if writer is None:
      continue
    found = (x[i : i + 1] for x in (k, v))
    if config.num_scales:  # numbers times scales
      found = map(np.rint, found)
    wanted = _marks(writer, np.array([start + i]), config)
    if not all(y is None or np.array_equal(x, y) for x, y in zip(found, wanted)):
      return start + i
  return None


def _spelled(numbers: np.ndarray, config: CacheConfig) -> np.ndarray:
  """Digits [B,D] of numbers, lowest digit first, repeated over the width."""
  channels = np.arange(config.head_dim)
  if not config.num_scales:
    return numbers[:, None].astype(np.int64) // _BASE ** (channels % _DIGITS) % _BASE
  digits = numbers[:, None].astype(np.int64) // _SMALL_BASE ** ((channels - 1) % _SMALL_DIGITS)
  return np.where(channels == 0, _SMALL_BASE - 1, digits % _SMALL_BASE)
