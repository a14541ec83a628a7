"""A manager's numbers for Prometheus. Needs the `metrics` extra."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paged_jax.host.manager import Manager

_GAUGES = {
  "num_pages": "Pages in the pool",
  "free_pages": "Pages without a holder",
  "peak_pages": "Most pages in use at once",
  "reclaimable_pages": "Pages kept for prefixes or swapped sequences only",
  "num_host_pages": "Pages of the host pool",
  "free_host_pages": "Free pages of the host pool",
  "running": "Sequences in a row of the cache",
  "swapped": "Sequences in host memory",
}
_COUNTERS = {
  "allocations": "Sequences begun",
  "deallocations": "Sequences ended",
  "refusals": "Requests refused for want of room",
  "pages_taken": "Pages taken from the pool",
  "pages_released": "Pages given back to the pool",
  "copies": "Pages copied on write",
  "pages_swapped_out": "Pages moved to host memory",
  "pages_swapped_in": "Pages moved back",
  "evicted_pages": "Pages that the prefix cache gave up",
}
_PREFIX_COUNTERS = {
  "queries": "Lookups in the prefix cache",
  "hits": "Lookups that found at least one token",
  "tokens_queried": "Tokens looked up",
  "tokens_hit": "Tokens found",
}


class ManagerCollector(Collector):
  """Metrics `paged_jax_*` of one manager, read when Prometheus asks.

  Example: `prometheus_client.REGISTRY.register(ManagerCollector(manager))`.
  """

  def __init__(self, manager: Manager, prefix: str = "paged_jax"):
    self._manager, self._prefix = manager, prefix

  def collect(self) -> Iterator[Metric]:
    """Every metric, as of now."""
    stats, prefixes = self._manager.stats(), self._manager.prefix_stats()
    for name, text in _GAUGES.items():
      yield GaugeMetricFamily(f"{self._prefix}_{name}", text, getattr(stats, name))
    for name, text in _COUNTERS.items():
      yield CounterMetricFamily(f"{self._prefix}_{name}", text, getattr(stats, name))
    for name, text in _PREFIX_COUNTERS.items():
      yield CounterMetricFamily(f"{self._prefix}_prefix_{name}", text, getattr(prefixes, name))
    yield GaugeMetricFamily(
      f"{self._prefix}_prefix_cached_tokens", "Tokens in the prefix cache", prefixes.cached_tokens
    )
