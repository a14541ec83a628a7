"""Layers cut into loops: in order, and each kind of layer compiled once or twice."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from paged_jax.models import pattern

CASES = {  # name: layers, and the shape of each run of each loop
  "llama": ("A" * 32, [[(1, 32)]]),
  "gemma 3 1B": (("WWWWWF" * 5)[:26], [[(4, 5), (4, 1)], [(1, 2)]]),
  "gpt-oss": ("WF" * 12, [[(12, 1), (12, 1)]]),
  "qwen": ("FFFFWW", [[(1, 4)], [(1, 2)]]),
  "gemma 4, last layers read": ("WWWWF" * 3 + "wwwwf" * 4, [[(3, 4), (3, 1)], [(4, 4), (4, 1)]]),
  "longer pattern wins": ("ABABCABABC", [[(2, 1)] * 5]),
  "first layer alone": ("X" + "WF" * 5, [[(1, 1)], [(5, 1), (5, 1)]]),
  "none": ("ABC", [[(1, 1)], [(1, 1)], [(1, 1)]]),
}


def in_order(loops):
  """The layers in the order in which the loops run them."""
  return [i for loop in loops for r in range(len(loop[0])) for run in loop for i in run[r].tolist()]


@pytest.mark.parametrize("name", CASES)
def test_pattern_is_found(name):
  kinds, shapes = CASES[name]
  loops = pattern.loops(kinds)
  assert [[run.shape for run in loop] for loop in loops] == shapes
  assert in_order(loops) == list(range(len(kinds)))


@hypothesis.given(strategies.lists(strategies.sampled_from("ABC"), min_size=1, max_size=40))
def test_loops_run_all_layers_in_order_and_a_run_has_one_kind(kinds):
  loops = pattern.loops(kinds)
  assert in_order(loops) == list(range(len(kinds)))
  for run in (run for loop in loops for run in loop):
    assert len({kinds[i] for i in run.flat}) == 1 and run.dtype == np.int32


@hypothesis.given(strategies.lists(strategies.sampled_from("ABC"), min_size=1, max_size=8))
def test_more_layers_of_a_pattern_take_no_more_runs(kinds):
  few, many = (sum(map(len, pattern.loops(kinds * repeats))) for repeats in (4, 40))
  assert few == many <= 3 * len(kinds)
