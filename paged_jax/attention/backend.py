"""What a backend of attention is."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from paged_jax import pages as pages_lib
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Plan, Tables

MAX_BLOCK_SIZE = 64


def scatter(pages: Pages, layer: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> Pages:
  """Writes by XLA's scatter, which is in place everywhere except on TPU."""
  return pages_lib.write(pages, layer, k, v, plan.slots)


def average(num_tokens: int, num_rows: int) -> int:
  """As many tokens as rows have on average, rounded down to a power of two, at most 64."""
  return min(MAX_BLOCK_SIZE, 1 << max(0, (num_tokens // num_rows).bit_length() - 1))


class Backend(NamedTuple):
  """One implementation of attention over pages; each module of a backend has one, `BACKEND`."""

  # (q [B,Q,D], pages, layer i32[], tables, plan, options) -> output [B,Q,D] and LSE f32[B,Q]
  attend: Callable[
    [jax.Array, Pages, jax.Array, Tables, Plan, Options], tuple[jax.Array, jax.Array]
  ]
  # Why it cannot serve these pages, None if it can.
  refusal: Callable[[Pages], str | None] = lambda pages: None
  # (pages, layer i32[], k [B,H,D], v [B,H,D], plan) -> the next pages
  write: Callable[[Pages, jax.Array, jax.Array, jax.Array, Plan], Pages] = scatter
  # (tokens in a batch, rows) -> most tokens in a block of queries
  block_size: Callable[[int, int], int] = average
