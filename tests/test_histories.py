"""Random histories of all verbs against the plain-Python model, laws checked after every step.

The same histories in every run; the sweep draws others each time.
"""

import dataclasses
import types

import chex
import hypothesis
import jax
import pytest
from hypothesis import strategies as st

import paged_jax
from paged_jax import groups, jitted
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
  "keys": config(page_size=3, num_pages=9, num_rows=4, max_length=14, dtype="bfloat16",
                 storage_dtype="uint16", storage_head_dim=3, value_dim=1),
  "single": config(page_size=4, num_pages=1, num_rows=1, max_length=8, dtype="float32"),
  "long, whole pages only": config(page_size=4, num_pages=5, num_rows=4, max_length=24,
                                   dtype="float32", copy_on_write=False),
}  # fmt: skip
CONFIGS["window"] = dataclasses.replace(CONFIGS["tight"], window=5)
CONFIGS["groups"] = (  # of one model: pages, windows and shapes differ, rows do not
  config(page_size=4, num_pages=9, num_rows=4, max_length=14, dtype="float32"),
  config(page_size=2, num_pages=13, num_rows=4, max_length=14, dtype="bfloat16", window=3),
)
CONFIGS["whole groups"] = tuple(
  dataclasses.replace(each, copy_on_write=False) for each in CONFIGS["groups"]
)


def traced_once(config):
  """The verbs, compiled; one that is traced a second time raises (`write`: for one group)."""
  num_groups = len(groups.each(config))
  chex.clear_trace_counter()
  verbs = types.SimpleNamespace(init=jitted.init)
  for name in {*strategies.VERBS, "plan", "pages_needed"}:
    most = num_groups if name == "write" else 1
    traced = chex.assert_max_traces(getattr(paged_jax, name), n=most)
    donated = () if name in ("plan", "pages_needed", "offload") else 0
    setattr(verbs, name, jax.jit(traced, donate_argnums=donated))
  return verbs


@pytest.mark.timeout(180)  # it compiles every verb, and runs them hundreds of times
@pytest.mark.parametrize(
  "name",
  [
    name if name in ("tight", "groups") else pytest.param(name, marks=pytest.mark.once)
    for name in CONFIGS
  ],
)
def test_every_history_matches_the_plain_model_and_traces_each_verb_once(name):
  config, verbs = CONFIGS[name], traced_once(CONFIGS[name])

  @hypothesis.settings(max_examples=30, derandomize=True, **SETTINGS)
  @hypothesis.given(strategies.histories(config, max_steps=40))
  def run(history):
    replay.check(config, history, verbs)

  run()


@pytest.mark.sweep
@hypothesis.settings(max_examples=400, **SETTINGS)
@hypothesis.given(st.data())
def test_every_history_matches_the_plain_model_for_any_config(data):
  config = data.draw(strategies.configs() | strategies.several_configs())
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
