"""A manager's numbers for Prometheus. Needs the `metrics` extra."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paged_jax import groups
from paged_jax.host.manager import Manager

_GAUGES = {
  "num_pages": "Pages in the pool",
  "free_pages": "Pages without a holder",
  "peak_pages": "Most pages in use at once",
  "reclaimable_pages": "Pages that eviction could free",
  "num_host_pages": "Pages of the host pool",
  "free_host_pages": "Free pages of the host pool",
  "running": "Sequences in a row of the cache",
  "swapped": "Sequences in host memory",
}
_COUNTERS = {
  "allocations": "Sequences begun",
  "deallocations": "Sequences ended",
  "refusals": "Calls refused because room was missing",
  "pages_taken": "Pages taken from the pool",
  "pages_released": "Pages given back to the pool",
  "copies": "Pages copied on write",
  "pages_swapped_out": "Pages moved to host memory",
  "pages_swapped_in": "Pages moved back to the device",
  "evicted_pages": "Pages that the prefix cache gave up",
}
_OF_SEQUENCES = {"running", "swapped", "allocations", "deallocations", "refusals"}  # of no pool
_PREFIX_COUNTERS = {
  "queries": "Lookups in the prefix cache",
  "hits": "Lookups that found at least one token",
  "tokens_queried": "Tokens looked up",
  "tokens_hit": "Tokens found",
}


class ManagerCollector(Collector):
  """Metrics `paged_jax_*` of one manager, read when Prometheus asks.

  With several groups of caches, metrics of pools have a label `group`, its number.

  Args:
    manager: The manager.
    prefix: The first part of each metric's name.

  >>> import prometheus_client
  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> registry = prometheus_client.CollectorRegistry()
  >>> registry.register(ManagerCollector(manager))
  >>> int(registry.get_sample_value("paged_jax_free_pages"))
  8
  """

  def __init__(self, manager: Manager, prefix: str = "paged_jax"):
    self._manager, self._prefix = manager, prefix

  def collect(self) -> Iterator[Metric]:
    """Every metric now."""
    stats, prefixes = list(groups.each(self._manager.stats())), self._manager.prefix_stats()
    for family, names in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
      for name, text in names.items():
        by_group = len(stats) > 1 and name not in _OF_SEQUENCES
        metric = family(f"{self._prefix}_{name}", text, labels=["group"] if by_group else [])
        for group, each in enumerate(stats if by_group else stats[:1]):
          metric.add_metric([str(group)] if by_group else [], getattr(each, name))
        yield metric
    for name, text in _PREFIX_COUNTERS.items():
      yield CounterMetricFamily(f"{self._prefix}_prefix_{name}", text, getattr(prefixes, name))
    yield GaugeMetricFamily(
      f"{self._prefix}_prefix_cached_tokens", "Tokens in the prefix cache", prefixes.cached_tokens
    )
