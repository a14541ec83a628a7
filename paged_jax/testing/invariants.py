"""The laws of a cache as assertions."""

from paged_jax import jitted
from paged_jax.types import Cache, Ledger


def check(cache: Cache | Ledger) -> None:
  """Raises `AssertionError` naming each broken law and how often it is broken."""
  ledger = cache.ledger if isinstance(cache, Cache) else cache
  counts = {law: int(count) for law, count in jitted.ledger.audit(ledger)._asdict().items()}
  broken = {law: count for law, count in counts.items() if count}
  assert not broken, f"broken laws: {broken}"
