"""The laws of a cache as assertions."""

from typing import Any

from paged_jax import groups, jitted
from paged_jax.types import Cache


def check(cache: Any) -> None:
  """Raises `AssertionError` that names each broken law and how often it is broken.

  `cache` is a cache, a ledger, or a tuple of either.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> pj.testing.invariants.check(pj.init(config))
  """
  parts = [each.ledger if isinstance(each, Cache) else each for each in groups.each(cache)]
  audits = groups.each(jitted.ledger.audit(groups.like(cache, parts)))
  broken = [{law: int(n) for law, n in each._asdict().items() if n} for each in audits]
  assert not any(broken), f"broken laws: {groups.like(cache, broken)}"
