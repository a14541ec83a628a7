"""Block tables: which page holds which tokens of which row."""

import jax
import jax.numpy as jnp

from paged_jax.types import Tables


def init(num_rows: int, pages_per_row: int, num_pages: int) -> Tables:
  """Tables of empty rows."""
  return Tables(
    block_tables=jnp.full((num_rows, pages_per_row), num_pages, jnp.int32),
    starts=jnp.zeros(num_rows, jnp.int32),
    lengths=jnp.zeros(num_rows, jnp.int32),
    stale=jnp.zeros(num_rows, jnp.bool_),
  )


def num_pages_for(lengths: jax.Array, page_size: int) -> jax.Array:
  """Pages that `lengths` tokens need; the last page may be partly filled."""
  return (lengths + page_size - 1) // page_size


def span(starts: jax.Array, lengths: jax.Array, page_size: int) -> tuple[jax.Array, jax.Array]:
  """First logical page, and number of pages, of rows that hold tokens `starts..lengths`."""
  first = jnp.where(lengths > 0, starts // page_size, 0)
  return first, num_pages_for(lengths, page_size) - first


def latest_start(lengths: jax.Array, window: int | None) -> jax.Array:
  """The last start at which rows of `lengths` tokens still have all that their next token sees."""
  return lengths if window is None else jnp.minimum(lengths, jnp.maximum(lengths + 1 - window, 0))


def page_at(block_tables: jax.Array, rows: jax.Array, columns: jax.Array, none: int) -> jax.Array:
  """Page of each (row, logical page); `none` where either is out of range."""
  columns = jnp.where(columns >= 0, columns, block_tables.shape[1])
  return block_tables.at[rows, columns].get(mode="fill", fill_value=none)
