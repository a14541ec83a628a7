"""Marks of who wrote a slot, kept beside the real keys and values and moved with them.

A mark fills the token's place in one extra layer: the keys spell its position, the values the
cache id of its writer, in digits that every dtype holds exactly.
"""

from collections.abc import Sequence

import numpy as np

_BASE, _DIGITS = 128, 4


def marks(
  cache_id: int, positions: np.ndarray, shape: tuple[int, int], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Keys and values [B,H,D] that mark tokens at `positions` i32[B] as written by `cache_id`."""
  writers = np.full_like(positions, cache_id)
  return tuple(  # type: ignore
    np.broadcast_to(_spelled(x, shape[1])[:, None], (len(x), *shape)).astype(dtype)
    for x in (positions, writers)
  )


def mismatch(writers: Sequence[int | None], start: int, k: np.ndarray, v: np.ndarray) -> int | None:
  """The first token from `start` on whose mark [B,H,D] is not that of its writer, or None."""
  for i, writer in enumerate(writers):
    if writer is None:
      continue
    wanted = marks(writer, np.array([start + i]), k.shape[1:], k.dtype)
    if not (np.array_equal(k[i : i + 1], wanted[0]) and np.array_equal(v[i : i + 1], wanted[1])):
      return start + i
  return None


def _spelled(numbers: np.ndarray, width: int) -> np.ndarray:
  """[B,D] digits, lowest first, again and again."""
  digits = np.arange(width) % _DIGITS
  return numbers[:, None].astype(np.int64) // _BASE**digits % _BASE
