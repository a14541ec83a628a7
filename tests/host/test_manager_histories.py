"""Random histories of the manager: bytes, counts and laws after every step."""

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from managed import Story, manager

from paged_jax.host import eviction

OPTIONS = {
  "plain": {},
  "spill": dict(spill=True, num_host_pages=5),
  "canary and scrub": dict(canary=True, scrub=True),
  "few entries, clock": dict(max_prefixes=2, eviction=eviction.CLOCK),
  "no host pool": dict(num_host_pages=0),
}


def run(seed, options, num_steps, **fields):
  story = Story(np.random.default_rng(seed), manager(options, num_rows=5, **fields))
  for _ in range(num_steps):
    story.step()
    story.check()
  story.end()
  return story


@pytest.mark.once
@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=12, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(
  seed=st.integers(0, 2**32),
  num_pages=st.sampled_from([1, 6]),
  dtype=st.sampled_from(["float32", "int8"]),
)
def test_a_history_keeps_every_byte_and_every_count(name, seed, num_pages, dtype):
  run(seed, OPTIONS[name], 40, num_pages=num_pages, dtype=dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("name", OPTIONS)
def test_many_histories(name):
  for seed in range(100):
    dtype = ("float32", "int8", "float8_e4m3fn")[seed % 3]
    run(seed, OPTIONS[name], 150, num_pages=(1, 5, 9, 14)[seed % 4], dtype=dtype)


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_a_day_of_random_operations():
  """As many as fit in ten minutes: `-m sweep -s` prints how many."""
  story = Story(np.random.default_rng(0), manager(OPTIONS["spill"], num_rows=5, num_pages=13))
  ends, steps = time.monotonic() + 600, 0
  while time.monotonic() < ends:
    for _ in range(50):
      story.step()
    story.check()
    steps += 50
  story.end()
  print(f"{steps} operations, {story.refused} refused for want of room, audit clean")
