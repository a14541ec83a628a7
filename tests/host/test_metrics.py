"""The Prometheus collector says what `stats` says."""

from managed import manager
from prometheus_client import CollectorRegistry, generate_latest

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
