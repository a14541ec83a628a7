"""An engine whose KV heads are split over devices gives the text of one device."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from serving import PROMPTS, engine, finish

from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling, calls

COLLECTIVES = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def mesh(ways, kind=AxisType.Auto):
  return jax.make_mesh((ways,), ("model",), axis_types=(kind,), devices=jax.devices()[:ways])


@pytest.mark.timeout(180)  # it compiles the programs of an engine
@pytest.mark.parametrize(
  ("ways", "preemption"), [(2, "swap"), pytest.param(4, "recompute", marks=pytest.mark.once)]
)
def test_text_is_that_of_one_device_with_prefixes_branches_and_preemption(ways, preemption):
  e = engine(mesh=mesh(ways), num_pages=8, preemption=preemption)
  prompts = [*PROMPTS, PROMPTS[2]]
  got = e.generate(prompts, Sampling(max_new_tokens=12, num_samples=2))
  assert [[c.tokens for c in each] for each in got] == [[tiny.greedy(p, 12)] * 2 for p in prompts]
  counts = e.counts
  assert (counts.swaps if preemption == "swap" else counts.recomputations) and counts.cached_tokens
  assert e.manager.cache.pages.kv.sharding.spec[2] == "model"
  finish(e)


def program(e, prompts):
  """The compiled text of a call."""
  c = e._calls
  past = dataclasses.replace(c._past, seen=np.zeros((len(c._rows.tokens), 0), bool))
  args = (e.manager.cache, c._model, c._rows, past, c._edits(), prompts, None)
  options = dict(num_steps=4, drafter=None, num_beams=1, implementation=c.implementation)
  return calls._run.lower(*args, **options).compile().as_text()


@pytest.mark.once
@pytest.mark.timeout(180)  # it compiles the programs of a model
def test_a_packaged_model_adds_up_twice_per_layer_and_gathers_its_logits():
  where = mesh(2)
  model = models.load(models.embedded(), "float32", mesh=where)
  pages = models.cache_config(
    model.config, num_pages=24, num_rows=4, max_length=128, dtype="float32"
  )
  e = Engine(model, EngineConfig(pages, prompt_sizes=(32,), num_steps=4), mesh=where)
  step = ["all-reduce"] * 3 + ["all-gather"]  # attention, MLP; the embedding; the logits
  assert sorted(re.findall(COLLECTIVES, program(e, None))) == sorted(step)
  found = re.findall(COLLECTIVES, program(e, e._calls.prompts([], 32)))
  assert sorted(found) == sorted(step * 2)  # the first step, and those after it


def test_a_mesh_with_explicit_axes_is_refused():
  with pytest.raises(ValueError, match=r"must have Auto axes, got .*Explicit for 'model'"):
    engine(mesh=mesh(2, AxisType.Explicit))
