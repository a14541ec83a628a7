"""A log replayed on the device, replayed on the host, and its verbs asked one by one: all the same."""

import jax
import numpy as np
import pytest
from story import config

import paged_jax
from paged_jax import jitted
from paged_jax import ledger as ledger_lib
from paged_jax.ledger import HostLedger
from paged_jax.testing import replay


def check(ledger, log):
  """Replays `log` on a host ledger, which is changed, on its copy on the device, and by verbs."""
  before = ledger.snapshot()
  on_device = jitted.ledger.replay(before, log)
  ledger.mark()
  for step in range(len(log.operands[0][0])):
    for verb, operands in zip(log.verbs, log.operands):
      getattr(ledger, verb)(*(x[step] for x in operands))
  replay.same(ledger.snapshot(), on_device)
  num_copies = ledger.num_copies
  ledger.rewind()
  replay.same(ledger.snapshot(), before)
  ledger.replay(jax.device_put(log))
  replay.same(ledger.snapshot(), on_device)
  assert ledger.num_copies == num_copies


@pytest.mark.parametrize("num_pages", [9, 40])
@pytest.mark.parametrize("seed", range(6))
def test_a_log_of_extends(seed, num_pages):
  rng = np.random.default_rng(seed)
  ledger = HostLedger(config(num_rows=5, num_pages=num_pages))
  ledger.extend(rng.integers(0, 9, 5))
  if seed % 2:  # tail pages are shared
    ledger.reorder(rng.integers(0, 5, 5))
  steps = rng.integers(-1 if seed == 4 else 0, 3, (6, 5)).astype(np.int32)
  check(ledger, paged_jax.Log(((steps,),), ("extend",)))


def test_a_log_of_all_verbs_runs_them_in_order_at_each_step():
  ledger = HostLedger(config())
  ledger.take_held(np.array(2), 2)
  steps = {
    "extend": ([[5, 1, 0], [2, 0, 4]],),
    "fork": ([[0], [3]], [[2], [0]], [[4], [0]]),
    "unshare": ([[0, 0, 0], [5, 0, 0]],),
    "hold": ([[2, 8], [8, 8]],),
    "trim": ([[5, 1, 3], [6, 0, 3]],),
    "slide": ([[4, 0, 0], [4, 0, 0]],),
    "drop": ([[8, 2], [8, 1]],),
    "free": ([[False, True, False], [False, False, False]],),
    "adopt": ([[1], [3]], [[[0]], [[8]]], [[3], [0]], [[0], [0]]),
    "reorder": ([[0, 1, 2], [2, 1, 0]],),
  }
  arrays = [tuple(np.array(x) for x in operands) for operands in steps.values()]
  check(ledger, paged_jax.Log(tuple(arrays), tuple(steps)))
  assert ledger.lengths.tolist() == [3, 0, 6]


def test_a_log_of_what_is_no_verb_is_refused():
  log = paged_jax.Log(((np.ones(1, np.int32),),), ("grow",))
  for replayed in (HostLedger(config()).replay, lambda log: ledger_lib.replay(None, log)):
    with pytest.raises(ValueError, match=r"log.verbs must be of .*got \('grow',\)"):
      replayed(log)


def test_a_log_whose_operands_have_different_numbers_of_steps_is_refused():
  ledger = HostLedger(config())
  operands = tuple((np.zeros((steps, 3), np.int32),) for steps in (2, 1))
  with pytest.raises(ValueError):
    ledger.replay(paged_jax.Log(operands, ("extend", "trim")))
