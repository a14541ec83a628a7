"""Which token comes next: each rule by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.engine import Sampling
from paged_jax.engine.device import draws as draws_lib

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))


def draws(**fields):
  return draws_lib.draws({0: (Sampling(**fields), 0)}, 1, 4)


@pytest.mark.parametrize(
  "fields, kept",
  [
    ({}, {0, 1, 2, 3}),
    (dict(top_k=2), {1, 3}),
    (dict(top_p=0.5), {1, 3}),  # 0.4 alone has less than half
    (dict(top_p=0.4), {1}),
    (dict(min_p=0.4), {1, 2, 3}),
    (dict(min_p=0.6), {1, 3}),
    (dict(top_k=3, min_p=0.9), {1}),
    (dict(top_k=3, top_p=0.5), {1, 3}),  # 0.4 of 0.9, then 0.3
  ],
)
def test_the_tokens_kept(fields, kept):
  assert {*np.flatnonzero(draws_lib.likely(LOGITS, draws(**fields))[0]).tolist()} == kept


def reference(logits, top_k, top_p, min_p):
  """What the rules mean, in float64; ties by lowest id."""
  order = np.argsort(-logits, kind="stable")[:top_k]
  weights = np.exp(logits[order].astype(np.float64) - logits[order[0]])
  before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
  kept = order[before < top_p]
  return {*kept[logits[kept] >= logits[order[0]] + np.log(np.float64(min_p))].tolist()}


@pytest.mark.parametrize("seed", range(6))
def test_ties_go_by_the_lowest_id(seed):
  random = np.random.default_rng(seed)
  logits = random.choice([-1.5, 0.0, 0.25, 2.0], size=(40, 23)).astype(np.float32)
  rules = [
    dict(top_k=int(random.integers(1, 24)), top_p=float(random.choice([0.03, 0.31, 0.77, 1.0])),
         min_p=float(random.choice([0.0, 0.05, 0.5]))) for _ in logits
  ]  # fmt: skip
  each = draws_lib.draws({i: (Sampling(**rule), 0) for i, rule in enumerate(rules)}, 40, 23)
  got = draws_lib.likely(jnp.array(logits), each)
  with np.errstate(divide="ignore"):
    for row, rule, mine in zip(logits, rules, got):
      assert {*np.flatnonzero(mine).tolist()} == reference(row, **rule), rule


@pytest.mark.parametrize("top_p", [1e-6, 1e-37, 1e-38, 1e-300])
def test_the_most_likely_token_is_always_kept(top_p):
  assert {*np.flatnonzero(draws_lib.likely(LOGITS, draws(top_p=top_p))[0]).tolist()} == {1}


def draw(logits, *rules, num_draws=512):
  """Tokens drawn from the same logits at many positions, [num_draws, rows], a row for each rule."""
  logits = jnp.broadcast_to(jnp.array(logits, jnp.float32), (len(rules), len(logits)))
  rows = {row: (Sampling(**rule), 0) for row, rule in enumerate(rules)}
  each = draws_lib.draws(rows, len(rules), logits.shape[1])
  positions = jnp.arange(num_draws, dtype=jnp.int32)[:, None] + jnp.zeros(
    (1, len(rules)), jnp.int32
  )
  return np.asarray(jax.lax.map(lambda p: draws_lib.draw(logits, each, p), positions))


def test_draws_follow_the_distribution_of_each_row():
  hot = [dict(), dict(temperature=1.0), dict(temperature=0.5), dict(temperature=1.0, top_k=3)]
  rules = [rule | dict(seed=seed) for seed, rule in enumerate(hot)]
  drawn = draw(np.log([0.1, 0.2, 0.3, 0.4]), *rules, num_draws=4096)
  counts = np.stack([np.bincount(drawn[:, row], minlength=4) for row in range(4)]) / 4096
  squares = np.array([1, 4, 9, 16]) / 30
  expected = [[0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], squares, [0, 2 / 9, 3 / 9, 4 / 9]]
  np.testing.assert_allclose(counts, expected, atol=0.03)
  assert not counts[3, 0]


def test_the_most_likely_token_is_the_limit_of_every_rule():
  logits = np.random.default_rng(0).normal(size=61)
  limits = [dict(temperature=5.0, top_k=1), dict(temperature=5.0, top_p=1e-6)]
  np.testing.assert_array_equal(draw(logits, {}, *limits), np.argmax(logits))


def test_a_draw_depends_on_seed_and_position_alone():
  logits = np.random.default_rng(0).normal(size=61)
  drawn = draw(logits, *(dict(temperature=1.0, seed=seed) for seed in (5, 6, 5)))
  again = draw(logits, {}, *(dict(temperature=1.0, seed=seed) for seed in (5, 6)))
  np.testing.assert_array_equal(drawn[:, 0], drawn[:, 2])
  np.testing.assert_array_equal(again[:, 1:], drawn[:, :2])
  assert np.mean(drawn[:, 0] == drawn[:, 1]) < 0.5


def test_bias_and_repetition_penalty_change_logits_by_hand():
  logits, seen = jnp.array([[2.0, -2.0, 1.0, 0.0]]), jnp.array([[True, True, False, False]])
  rules = draws(repetition_penalty=2.0, logit_bias={3: 5.0, 2: -1.0})
  np.testing.assert_allclose(draws_lib.adjust(logits, rules, seen), [[1.0, -4.0, 0.0, 5.0]])


def test_logprob_is_that_of_the_model():
  got = draws_lib.logprob(LOGITS + 3, jnp.array([2]))
  np.testing.assert_allclose(got, np.log([0.2]), rtol=1e-5)
