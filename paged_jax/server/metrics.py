"""Prometheus metrics of a server: its engine, its requests in flight, their times."""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paged_jax.engine import Completion, Engine
from paged_jax.host.metrics import ManagerCollector

_COUNTERS = {
  "drawn_tokens": "Tokens drawn",
  "prompt_tokens": "Prompt tokens computed",
  "cached_tokens": "Prompt tokens found in the prefix cache",
}
_FIRST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class InFlight(Protocol):
  """A request that the engine works on."""

  @property
  def begun(self) -> bool:
    """Whether it has drawn a token."""
    ...


class EngineCollector(Collector):
  """Metrics `paged_jax_*` of an engine's counts, and of requests in flight."""

  def __init__(self, engine: Engine, requests: Collection[InFlight]):
    self._engine, self._requests = engine, requests

  def collect(self) -> Iterator[Metric]:
    """Every metric, as of now."""
    counts = self._engine.counts
    for name, text in _COUNTERS.items():
      yield CounterMetricFamily(f"paged_jax_{name}", text, getattr(counts, name))
    preemptions = CounterMetricFamily("paged_jax_preemptions", "Preemptions", labels=["kind"])
    preemptions.add_metric(["swap"], counts.swaps)
    preemptions.add_metric(["recompute"], counts.recomputations)
    yield preemptions
    begun = [request.begun for request in tuple(self._requests)]
    text = "HTTP requests in flight, by whether they have drawn a token"
    states = GaugeMetricFamily("paged_jax_requests", text, labels=["state"])
    states.add_metric(["running"], sum(begun))
    states.add_metric(["waiting"], len(begun) - sum(begun))
    yield states


class Metrics:
  """All metrics of a server."""

  def __init__(self, engine: Engine, requests: Collection[InFlight]):
    self.registry = prometheus_client.CollectorRegistry()
    self.registry.register(ManagerCollector(engine.manager))
    self.registry.register(EngineCollector(engine, requests))
    self._ended = prometheus_client.Counter(
      "paged_jax_samples_ended", "Samples by why they ended", ["reason"], registry=self.registry
    )
    self._first_seconds = prometheus_client.Histogram(
      "paged_jax_time_to_first_token_seconds", "From a request to each sample's first token",
      buckets=_FIRST_SECONDS, registry=self.registry,
    )  # fmt: skip
    self._token_seconds = prometheus_client.Histogram(
      "paged_jax_time_per_token_seconds", "Per token after the first, a mean over tokens that came together",
      buckets=_TOKEN_SECONDS, registry=self.registry,
    )  # fmt: skip

  def observe(self, seconds: float, num_tokens: int, *, first: bool) -> None:
    """Records the time that a sample took for tokens that came together."""
    if first:
      self._first_seconds.observe(seconds)
    else:
      self._token_seconds.observe(seconds / num_tokens)

  def count(self, completions: Sequence[Completion], num_samples: int) -> None:
    """Records how samples ended. Those without a completion count as cancelled."""
    for completion in completions:
      self._ended.labels(completion.reason).inc()
    self._ended.labels("cancelled").inc(num_samples - len(completions))
