"""What a backend of attention is."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from paged_jax import pages as pages_lib
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Part, Plan, Tables, Windows

MAX_BLOCK_SIZE = 64
MAX_SHARED_BLOCK_SIZE = 16  # where keys contain values: 16 to 128 query heads share a KV head
FEW = 8  # tokens of a row that decodes or verifies drafts, at most
SPARE = 2048  # places of queries that may stay empty because rows do not fill their blocks


def scatter(pages: Pages, layer: jax.Array, k: jax.Array, v: jax.Array | None, plan: Plan) -> Pages:
  """Writes by XLA's scatter, which is in place everywhere except on TPU."""
  return pages_lib.write(pages, layer, k, v, plan.slots)


def block_size(num_tokens: int, num_rows: int, longest: int) -> int:
  """Most tokens in a block, for a part of at most `num_rows` rows, of about `longest` at most.

  All tokens of a row where rows bring few. Else 64, as for a prompt, or fewer so that at most
  `SPARE` places, or one per token, can be empty.
  """
  if longest <= FEW:
    return _power_of_two(longest)
  size = min(MAX_BLOCK_SIZE, _power_of_two(num_tokens))
  while size > 1 and num_rows * (size - 1) > max(num_tokens, SPARE):
    size //= 2
  return size


def _power_of_two(size: int) -> int:
  """The least one that is not below `size`."""
  return 1 << (size - 1).bit_length()


class Backend(NamedTuple):
  """One implementation of attention over pages; each module of a backend has one, `BACKEND`."""

  # (q [B,Q,D], pages, layer i32[], tables, part, options) -> output [B,Q,D], or at least as wide as
  # values, and LSE f32[B,Q], which is of no use where the options do not want it
  attend: Callable[
    [jax.Array, Pages, jax.Array, Tables, Part, Options], tuple[jax.Array, jax.Array | None]
  ]
  # (pages, pages of a row) -> why it cannot serve them, None if it can
  refusal: Callable[[Pages, int], str | None] = lambda pages, pages_per_row: None
  # (pages, layer i32[], k [B,H,D], v [B,H,D] or None if pages hold keys only, plan) -> the next pages
  write: Callable[[Pages, jax.Array, jax.Array, jax.Array | None, Plan], Pages] = scatter
  # (tokens of a part, most rows of it, longest of them) -> most tokens in a block
  block_size: Callable[[int, int, int], int] = block_size
  # (pages, slots i32[B], most tokens in a block) -> where writes go, none if slots are enough
  windows: Callable[[Pages, jax.Array, int], tuple[Windows, ...]] = lambda pages, slots, size: ()
  # Whether q and the output are as wide as the page array, or without its padding.
  as_stored: bool = True
