"""Where the tokens of a plan go, and why a token has no slot. Integers only.

Axis letters: B tokens in a call; a ledger has S rows, N pages and T tokens per page.
"""

from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from paged_jax import groups
from paged_jax.ledger import pool as pool_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.types import Ledger, Plan

FAULTS = (  # why a token has no slot of its own; numbered from 1, 0 is no fault
  "is in an empty row, which nobody has extended",
  "is beyond its row's length",
  "is before the first live token of its row",
  "does not ascend in its row, or its row comes in several pieces",
  "is on a page that others hold, too",
  "is not where the plan says: the cache has changed since",
  "is in one row more than its part may have",
  "is in no row of this cache",
)
_MOVED, _CROWDED, _NO_ROW = range(len(FAULTS) - 2, len(FAULTS) + 1)
_SHOWN = 10  # tokens that an error lists


def place(
  ledger: Ledger, rows: jax.Array, positions: jax.Array, ordered: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Looks up the slots of tokens at `rows` and `positions`, i32[B] each.

  `ordered` bool[B] says which of them are in order.

  Returns:
    faults i32[B], the number of each token's fault in `FAULTS`, 0 if it has a slot of its own; and
    slots i32[B], page * T + offset.
  """
  tables, pool, size = ledger.tables, ledger.pool, ledger.page_size
  lengths = tables.lengths.at[rows].get(mode="fill", fill_value=0)
  starts = tables.starts.at[rows].get(mode="fill", fill_value=0)
  page = tables_lib.page_at(tables.block_tables, rows, positions // size, pool.num_pages)
  found = [
    lengths == 0, positions >= lengths, positions < starts, ~ordered,
    pool_lib.refcounts(pool, page) != 1,
  ]  # fmt: skip
  faults = jnp.select(found, [jnp.int32(i) for i in range(1, 1 + len(found))], jnp.int32(0))
  faults = jnp.where(rows == ledger.num_rows, 0, faults)
  return faults, page * size + positions % size


def check(ledgers: tuple[Ledger, ...], plans: tuple[Plan, ...]) -> None:
  """Raises if a token of the `plans` has no slot in its ledger; a check of checkify while tracing."""
  faults, first, rows, positions, why = _examine(ledgers, plans)
  if isinstance(faults, jax.core.Tracer):
    legend = ", ".join(f"{number} {fault}" for number, fault in enumerate(FAULTS, start=1))
    message = "tokens {first} (rows {rows}, positions {positions}) have no slot, because of {why}: "
    checkify.check(
      jnp.all(faults == 0), message + legend, first=first, rows=rows, positions=positions, why=why
    )
  elif count := np.count_nonzero(faults):
    each = zip(*(x[:count].tolist() for x in (first, rows, positions, why)))
    reasons = [f"token {i} (row {row}, position {p}) {FAULTS[x - 1]}" for i, row, p, x in each]
    raise ValueError(f"{count} of {len(faults)} tokens have no slot: {', '.join(reasons)}")


@jax.jit
def _examine(ledgers: tuple[Ledger, ...], plans: tuple[Plan, ...]) -> tuple[jax.Array, ...]:
  """The fault of each token i32[B]; of the first faulty ones the token, row, position and fault."""
  plan = plans[0]
  in_order = ordered(plan.rows, plan.positions, ledgers[0].num_rows)
  placed = [place(ledger, plan.rows, plan.positions, in_order) for ledger in ledgers]
  faults = jnp.zeros_like(plan.rows)
  for found, _ in placed:
    faults = jnp.where(faults == 0, found, faults)
  attends = jnp.concatenate([part.last for part in plan.parts]) >= 0
  moved = groups.any_of(each.slots != slots for each, (_, slots) in zip(plans, placed))
  moved &= plan.rows < ledgers[0].num_rows
  faults = jnp.where((faults == 0) & moved, jnp.where(attends, _MOVED, _CROWDED), faults)
  faults = jnp.where((faults == 0) & ~plan.ok, _NO_ROW, faults)
  (first,) = jnp.nonzero(faults, size=min(_SHOWN, len(faults)), fill_value=len(faults))
  first = first.astype(jnp.int32)
  shown = (x.at[first].get(mode="fill", fill_value=-1) for x in (plan.rows, plan.positions, faults))
  return faults, first, *shown


def crowded(rows: jax.Array, parts: Sequence[tuple[int, int, int]], num_rows: int) -> jax.Array:
  """Which tokens of `rows` i32[B] are in one row more than their part may have: bool[B]."""
  found, begin = [], 0
  for num_tokens, most, _ in parts:
    part = rows[begin : begin + num_tokens]
    fresh = jnp.pad(part[1:] != part[:-1], (1, 0), constant_values=True) & (part < num_rows)
    found.append((jnp.cumsum(fresh, dtype=jnp.int32) > most) & (part < num_rows))
    begin += num_tokens
  return jnp.concatenate(found)


def ordered(rows: jax.Array, positions: jax.Array, num_rows: int) -> jax.Array:
  """Which tokens i32[B] are in the first piece of their row and ascend up to there: bool[B]."""
  tokens = jnp.arange(rows.shape[0], dtype=jnp.int32)
  fresh = jnp.pad(rows[1:] != rows[:-1], (1, 0), constant_values=True)
  begin = jax.lax.cummax(jnp.where(fresh, tokens, 0))
  first = jnp.full(num_rows, rows.shape[0], jnp.int32).at[rows].min(tokens, mode="drop")
  falls = ~fresh & jnp.pad(positions[1:] <= positions[:-1], (1, 0))
  fallen = jnp.cumsum(falls, dtype=jnp.int32)
  return (first.at[rows].get(mode="fill", fill_value=0) == begin) & (fallen == fallen[begin])
