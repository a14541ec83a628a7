"""Random histories of all verbs against the plain-Python model, laws checked after every step.

The same histories in every run; the sweep draws others each time.
"""

import types

import chex
import hypothesis
import jax
import pytest
from hypothesis import strategies as st

import paged_jax
from paged_jax import jitted
from paged_jax.testing import replay, strategies

SETTINGS = dict(
  deadline=None,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
  print_blob=True,
)


def config(**fields):
  return paged_jax.CacheConfig(num_layers=2, num_kv_heads=2, head_dim=2, **fields)


CONFIGS = {
  "tight": config(page_size=4, num_pages=7, num_rows=4, max_length=14, dtype="float32"),
  "bits": config(page_size=3, num_pages=33, num_rows=5, max_length=14, dtype="bfloat16",
                 storage_dtype="uint16"),
  "tokens": config(page_size=1, num_pages=32, num_rows=3, max_length=9, dtype="float16",
                   storage_head_dim=5),
  "single": config(page_size=4, num_pages=1, num_rows=1, max_length=8, dtype="float32"),
  "long, whole pages only": config(page_size=4, num_pages=5, num_rows=4, max_length=24,
                                   dtype="float32", copy_on_write=False),
}  # fmt: skip


def traced_once():
  """The verbs, compiled; one that is traced a second time raises."""
  chex.clear_trace_counter()
  verbs = types.SimpleNamespace(init=jitted.init)
  for name in {*strategies.VERBS, "plan", "pages_needed"}:
    traced = chex.assert_max_traces(getattr(paged_jax, name), n=1)
    donated = () if name in ("plan", "pages_needed", "offload") else 0
    setattr(verbs, name, jax.jit(traced, donate_argnums=donated))
  return verbs


@pytest.mark.timeout(180)  # it compiles every verb, and runs them hundreds of times
@pytest.mark.parametrize(
  "name",
  [name if name == "tight" else pytest.param(name, marks=pytest.mark.once) for name in CONFIGS],
)
def test_every_history_matches_the_plain_model_and_traces_each_verb_once(name):
  config, verbs = CONFIGS[name], traced_once()

  @hypothesis.settings(max_examples=30, derandomize=True, **SETTINGS)
  @hypothesis.given(strategies.histories(config, max_steps=40))
  def run(history):
    replay.check(config, history, verbs)

  run()


@pytest.mark.sweep
@hypothesis.settings(max_examples=400, **SETTINGS)
@hypothesis.given(st.data())
def test_every_history_matches_the_plain_model_for_any_config(data):
  config = data.draw(strategies.configs())
  replay.check(config, data.draw(strategies.histories(config, max_steps=60)))


def test_the_comparison_with_the_model_can_fail():
  def greedy_extend(cache, num_tokens):
    cache, info = jitted.extend(cache, num_tokens)
    return cache, info._replace(ok=~info.ok)

  verbs = types.SimpleNamespace(**vars(jitted))
  verbs.extend = greedy_extend
  config = CONFIGS["tight"]
  with pytest.raises(AssertionError, match="ok of"):
    replay.check(config, [strategies.Step("extend", ([1, 0, 0, 0],))], verbs)
