"""The laws of a cache as assertions."""

from paged_jax import jitted
from paged_jax.types import Cache, Ledger


def check(cache: Cache | Ledger) -> None:
  """Raises `AssertionError` that names each broken law and how often it is broken.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> pj.testing.invariants.check(pj.init(config))
  """
  ledger = cache.ledger if isinstance(cache, Cache) else cache
  counts = {law: int(count) for law, count in jitted.ledger.audit(ledger)._asdict().items()}
  broken = {law: count for law, count in counts.items() if count}
  assert not broken, f"broken laws: {broken}"
