"""The audit finds each fault."""

import dataclasses

import jax.numpy as jnp
import pytest
from story import empty, extend

from paged_jax import jitted
from paged_jax.testing import invariants


def broken(ledger, part, **changes):
  return dataclasses.replace(
    ledger, **{part: dataclasses.replace(getattr(ledger, part), **changes)}
  )


FAULTS = {
  "refcounts": lambda x: broken(x, "pool", refcount=x.pool.refcount.at[0].add(1)),
  "holds": lambda x: broken(x, "pool", holds=x.pool.holds.at[7].set(-1)),
  "bitmap": lambda x: broken(x, "pool", free=x.pool.free ^ 1),
  "num_free": lambda x: broken(x, "pool", num_free=x.pool.num_free - 1),
  "cursor": lambda x: broken(x, "pool", cursor=jnp.int32(8)),
  "tables": lambda x: broken(x, "tables", block_tables=x.tables.block_tables.at[1, 0].set(0)),
  "rows": lambda x: broken(x, "tables", starts=x.tables.starts.at[0].set(6)),
}


@pytest.mark.parametrize("law", FAULTS)
def test_audit_finds_each_broken_law(law):
  cache, _ = extend(empty(), 5, 0, 0)
  assert all(int(count) == 0 for count in jitted.audit(cache))
  invariants.check(cache)
  fault = FAULTS[law](cache.ledger)
  assert int(getattr(jitted.ledger.audit(fault), law)) > 0
  with pytest.raises(AssertionError, match=law):
    invariants.check(fault)


def test_bits_beyond_the_last_page_are_audited_too():
  cache, _ = extend(empty(), 5, 0, 0)
  fault = broken(cache.ledger, "pool", free=cache.ledger.pool.free | jnp.uint32(1 << 31))
  assert int(jitted.ledger.audit(fault).bitmap) == 1
