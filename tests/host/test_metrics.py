"""The Prometheus collector says what `stats` says."""

from managed import begin, manager
from prometheus_client import CollectorRegistry, generate_latest
from story import config

from paged_jax.host import Request
from paged_jax.host.metrics import ManagerCollector


def test_metrics_are_the_managers_numbers():
  m = manager(num_pages=9, num_rows=5)
  registry = CollectorRegistry()
  registry.register(ManagerCollector(m))
  handle = m.allocate(Request("a", tokens=[1] * 6))
  m.store_prefix(handle)
  m.allocate(Request("b", tokens=[1] * 6))
  value = registry.get_sample_value
  assert value("paged_jax_free_pages") == 9 - 3  # b's tail page was copied
  assert value("paged_jax_copies_total") == m.stats().copies == 1
  assert value("paged_jax_prefix_tokens_hit_total") == 5  # no logits: the last is computed
  assert value("paged_jax_running") == 2
  assert b"paged_jax_prefix_cached_tokens 6.0" in generate_latest(registry)


def test_metrics_of_pools_are_by_group():
  m = manager(
    None, (config(num_pages=12, max_length=32), config(num_pages=9, window=6, max_length=32))
  )
  registry = CollectorRegistry()
  registry.register(ManagerCollector(m))
  handle = begin(m, list(range(20)))
  m.extend(handle, 1)  # a window of 6 and a page size of 4: tokens 15 to 20
  value = registry.get_sample_value
  free = [value("paged_jax_free_pages", {"group": group}) for group in ("0", "1")]
  released = [value("paged_jax_pages_released_total", {"group": group}) for group in ("0", "1")]
  assert (free, released) == ([12 - 6, 9 - 3], [0, 2])
  assert value("paged_jax_running") == value("paged_jax_allocations_total") == 1
