"""Keys and values of sequences, written and read by the host; in canary mode with marks.

Canary mode adds one layer. In it each written slot has a mark: its key spells the token's
position, and its value spells the cache id of the sequence that wrote it, in digits that every
dtype represents exactly. Marks move with their pages.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.host import errors
from paged_jax.host.config import whole
from paged_jax.host.sequences import Handle, Sequences
from paged_jax.host.sharing import Sharing
from paged_jax.host.state import ID_SIZES, bucket

_BASE, _DIGITS = 128, 4


class Tensors:
  """Bodies of write_kv and read_kv. Not thread-safe.

  Args:
    sequences: The live sequences.
    sharing: Copies shared pages before a write.
  """

  def __init__(self, sequences: Sequences, sharing: Sharing):
    self._sequences, self._sharing, self._turn = sequences, sharing, sequences.turn
    self._config, self._state = self._turn.config, self._turn.state
    self._canary = self._turn.options.canary

  def layer(self, layer: int) -> int:
    """The layer's number as an int; raises if there is no such layer."""
    if not 0 <= whole("layer", layer) < self._config.num_layers:
      raise ValueError(f"layer must be in [0, {self._config.num_layers}), got {layer}")
    return int(layer)

  def checked(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values as [B,H,D]; raises if they do not fit the pool."""
    shape = (self._config.num_kv_heads, self._config.head_dim)
    k, v = (jnp.asarray(x)[None] if jnp.ndim(x) == 2 else jnp.asarray(x) for x in (k, v))
    for name, x in (("k", k), ("v", v)):
      if x.ndim != 3 or x.shape[1:] != shape or x.shape[0] != k.shape[0] or not x.shape[0]:
        raise errors.ShapeMismatch(name, ("B", *shape), x.shape)
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise errors.ShapeMismatch(name, "floating-point", x.dtype)
    return k, v

  def write(self, handle: Handle, layer: int, position: int, k: jax.Array, v: jax.Array) -> None:
    """Writes keys and values [B,H,D] into the slots of the tokens from `position` on."""
    config, state, count = self._config, self._state, k.shape[0]
    row = self._range(handle, position, count)
    self._sharing.own(handle, position)
    size = bucket(count, ID_SIZES)
    size *= -(-count // size)
    rows, positions = np.full(size, config.num_rows, np.int32), np.zeros(size, np.int32)
    rows[:count], positions[:count] = row, position + np.arange(count)
    pad = ((0, size - count), (0, 0), (0, 0))
    plan = state.verbs.plan(state.cache, rows, positions)
    k, v = (jnp.pad(x.astype(config.dtype), pad) for x in (k, v))
    state.cache = state.verbs.write(state.cache, jnp.int32(layer), k, v, plan)
    if self._canary:
      marks = _marks(handle.cache_id, positions, k.shape[1:], np.dtype(config.dtype))
      state.cache = state.verbs.write(state.cache, jnp.int32(config.num_layers), *marks, plan)
      writers = self._writers(handle)
      writers += [None] * (position + count - len(writers))
      writers[position : position + count] = [handle.cache_id] * count

  def read(
    self, handle: Handle, layer: int, start: int, num_tokens: int
  ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Starts a read; returns a function that waits for keys and values [num_tokens,H,D]."""
    row = self._range(handle, start, num_tokens)
    state, rows, num_layers = self._state, np.array([row], np.int32), self._config.num_layers
    gathered = state.verbs.gather(state.cache, jnp.int32(layer), rows)
    marks = state.verbs.gather(state.cache, jnp.int32(num_layers), rows) if self._canary else None
    writers = self._writers(handle)[start : start + num_tokens]
    pages = state.ledger.groups[0].block_tables[row].copy()
    part = slice(start, start + num_tokens)

    def wait() -> tuple[np.ndarray, np.ndarray]:
      if marks is not None:
        token = _mismatch(writers, start, *(np.asarray(x[0, part]) for x in marks))
        if token is not None:
          page = int(pages[token // self._config.page_size])
          raise errors.CanaryMismatch(handle.request_id, token, page)
      k, v = (np.asarray(x[0, part]) for x in gathered)
      return k, v

    return wait

  def _writers(self, handle: Handle) -> list[int | None]:
    """The cache id that wrote each token; empty after a report, since programs write no marks."""
    if handle.marked_at != self._state.num_reports:
      handle.writers, handle.marked_at = [], self._state.num_reports
    return handle.writers

  def _range(self, handle: Handle, start: int, count: int) -> int:
    """The sequence's row; raises unless it holds `count` tokens from `start` on."""
    row = self._sequences.running(handle)
    begin, end = self._sequences.bounds(row)
    for token in (start, start + count - 1):
      if not begin <= token < end or count < 1:
        raise self._sequences.unmapped(handle, token)
    return row


def _marks(
  cache_id: int, positions: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Keys and values [B,H,D] that mark tokens at `positions` i32[B] as written by `cache_id`."""
  writers = np.full_like(positions, cache_id)
  return tuple(  # type: ignore
    np.broadcast_to(_spelled(x, shape[1])[:, None], (len(x), *shape)).astype(dtype)
    for x in (positions, writers)
  )


def _mismatch(
  writers: Sequence[int | None], start: int, k: np.ndarray, v: np.ndarray
) -> int | None:
  """The first token from `start` on whose mark [B,H,D] is not that of its writer, or None."""
  for i, writer in enumerate(writers):
    if writer is None:
      continue
    wanted = _marks(writer, np.array([start + i]), k.shape[1:], k.dtype)
    if not (np.array_equal(k[i : i + 1], wanted[0]) and np.array_equal(v[i : i + 1], wanted[1])):
      return start + i
  return None


def _spelled(numbers: np.ndarray, width: int) -> np.ndarray:
  """Digits [B,D] of numbers, lowest digit first, repeated over the width."""
  digits = np.arange(width) % _DIGITS
  return numbers[:, None].astype(np.int64) // _BASE**digits % _BASE
