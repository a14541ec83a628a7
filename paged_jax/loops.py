"""Loops that turn as often as the data needs, and stay in place under `vmap`."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")
COMPARED = 64 * 64  # most comparisons that take less time than a bisection


def any_of(flag: jax.Array) -> jax.Array:
  """`flag` bool[]; under `vmap`, whether it is set for any element of the batch.

  As the condition of a loop it keeps the condition scalar. With a batched condition `vmap` selects
  between the old and the next carry at every turn, which copies the whole carry. The price: an
  element that is done goes on turning with the others, and its body must then change nothing.
  """
  return _any_of(flag)


def _any_of_batch(axis_size, in_batched, flag):
  del axis_size, in_batched
  return any_of(jnp.any(flag)), False


_any_of = jax.custom_batching.custom_vmap(lambda flag: flag)
_any_of.def_vmap(_any_of_batch)


def locate(counts: jax.Array, ranks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The rows of things that are numbered through all rows, if row r has `counts[r]` of them.

      # counts  2 0 3
      # ranks   0 1 2 3 4 5        rows  0 0 2 2 2 3        nth  0 1 0 1 2 -

  Returns:
    rows i32, S past the end; and nth i32, the number of each thing within its row.
  """
  ends = jnp.cumsum(counts, dtype=jnp.int32)
  # On TPU each step of a bisection is several operations, and all comparisons are one.
  method = "compare_all" if ends.size * ranks.size <= COMPARED else "scan_unrolled"
  rows = jnp.searchsorted(ends, ranks, side="right", method=method).astype(jnp.int32)
  begins = (ends - counts).at[rows].get(mode="fill", fill_value=0)
  return rows, ranks - begins


def earlier(ids: jax.Array) -> jax.Array:
  """For each entry of `ids` i32[B], how many earlier entries are equal."""
  order = jnp.arange(ids.shape[0], dtype=jnp.int32)
  same = (ids[:, None] == ids[None, :]) & (order[:, None] < order[None, :])
  return jnp.sum(same, axis=0, dtype=jnp.int32)  # over the outer axis, where CPUs use all lanes


def fold(
  counts: jax.Array,
  step: Callable[[Carry, jax.Array, jax.Array], Carry],
  carry: Carry,
  *,
  chunk: int,
) -> Carry:
  """Folds `step(carry, rows, nth)` over `counts[r]` things of each row, `chunk` at a time.

  Past the end `rows` is S, and the step must not change the carry.
  """
  total = jnp.sum(counts, dtype=jnp.int32)

  def body(state):
    base, carry = state
    rows, nth = locate(counts, base + jnp.arange(chunk, dtype=jnp.int32))
    return base + chunk, step(carry, rows, nth)

  return jax.lax.while_loop(lambda state: any_of(state[0] < total), body, (jnp.int32(0), carry))[1]
