"""Which token comes next: each rule by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.engine import Sampling
from paged_jax.engine.device import draws as draws_lib

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
S, V = 16, 300  # of the table


def draws(**fields):
  return draws_lib.draws({0: (Sampling(temperature=1.0, **fields), 0)}, 1, 4)


def kept(logits, **fields):
  """The tokens kept of one row, whatever its largest logit."""
  (row,) = draws_lib.likely(logits - jnp.max(logits), draws(**fields))
  return {*np.flatnonzero(row).tolist()}


@pytest.mark.parametrize(
  "fields, tokens",
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
def test_the_tokens_kept(fields, tokens):
  assert kept(LOGITS, **fields) == tokens


@pytest.mark.parametrize("top_p", [1e-6, 1e-37, 1e-38, 1e-300])
def test_the_most_likely_token_is_always_kept(top_p):
  assert kept(LOGITS, top_p=top_p) == {1}


def judged(logits, top_k, top_p, min_p):
  """What the rules mean, by sorting, in float64; ties by lowest id."""
  order = np.argsort(-logits, kind="stable")[:top_k]
  weights = np.exp(logits[order].astype(np.float64))
  before = np.cumsum(weights) - weights
  inside = before < (np.float32(top_p) * weights.sum() if top_p < 1 else np.inf)
  inside[0] = True
  with np.errstate(divide="ignore"):
    return np.isin(np.arange(len(logits)), order[inside]) & (logits >= np.log(np.float64(min_p)))


def powers(random):
  """Logits whose weights are powers of two as far as float32 has them, many of them equal."""
  return np.log(2.0 ** -random.integers(0, 20, (S, V)))


TINY = np.float32(1e-45)
EXTREME = {
  "few values": lambda random: random.choice([-1.5, -0.25, 0.0, -3.5], (S, V)),
  "powers of two": powers,
  "normal": lambda random: 4 * random.normal(size=(S, V)),
  "all equal": lambda random: np.full((S, V), 7.0),
  "one finite": lambda random: np.where(np.arange(V) == random.integers(0, V, (S, 1)), 3, -np.inf),
  "half impossible": lambda random: np.where(random.random((S, V)) < 0.5, -np.inf, random.random()),
  "huge": lambda random: random.choice([-3e38, -1e38, 0.0, 1e30], (S, V)),
  "denormal": lambda random: -TINY * random.integers(0, 4, (S, V)),
  "both zeros": lambda random: random.choice(np.float32([0.0, -0.0, -1.0]), (S, V)),
  "steps of one bit": lambda random: np.nextafter(
    np.float32(-1), np.float32(random.choice([0, -2], (S, V)))
  ),
}


@pytest.fixture(scope="module")
def likely():
  return jax.jit(draws_lib.likely)


@pytest.mark.parametrize("name", EXTREME)
def test_the_tokens_kept_are_those_of_sorting(likely, name):
  """A row in which rounding could move the limit of the mass counts only if the sums are exact."""
  random = np.random.default_rng(0)
  for _ in range(4):
    logits = np.float32(EXTREME[name](random))
    logits -= logits.max(axis=1, keepdims=True)
    rules = [
      dict(
        top_k=int(random.choice([1, 2, 7, V // 2, V - 1, V])),
        top_p=float(random.choice([1e-9, 0.03125, 0.25, 0.3, 0.75, 0.999, 1.0])),
        min_p=float(random.choice([0.0, 0.0, 0.05, 1.0])),
      )
      for _ in range(S)
    ]
    each = draws_lib.draws(
      {i: (Sampling(temperature=1.0, **x), 0) for i, x in enumerate(rules)}, S, V
    )
    for row, rule, mine in zip(logits, rules, np.asarray(likely(logits, each)), strict=True):
      wanted = [
        judged(row, **rule | dict(top_p=rule["top_p"] * x)) for x in (1 - 1e-6, 1, 1 + 1e-6)
      ]
      sure = name == "all equal" or (wanted[0] == wanted[2]).all() or rule["top_p"] == 1
      assert any((mine == x).all() for x in ([wanted[1]] if sure else wanted)), rule


@pytest.mark.parametrize("fields", [dict(), dict(top_k=3), dict(top_p=0.5), dict(min_p=0.1)])
def test_logits_that_are_no_numbers_end_the_search_too(fields):
  assert kept(jnp.full((1, 4), jnp.nan), **fields) == set()


def draw(logits, *rules, num_draws=512):
  """Tokens drawn from the same logits at many positions, [num_draws, rows], a row for each rule."""
  logits = jnp.broadcast_to(jnp.array(logits, jnp.float32), (len(rules), len(logits)))
  rows = {row: (Sampling(**rule), 0) for row, rule in enumerate(rules)}
  each = draws_lib.draws(rows, len(rules), logits.shape[1])
  positions = jnp.arange(num_draws, dtype=jnp.int32)[:, None] + jnp.zeros(
    (1, len(rules)), jnp.int32
  )
  return np.asarray(jax.lax.map(lambda p: draws_lib.draw(logits, each, p)[0], positions))


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
  wanted = Sampling(repetition_penalty=2.0, logit_bias={3: 5.0, 2: -1.0})
  rules = draws_lib.adjustments({0: wanted}, 1, 4)
  np.testing.assert_allclose(draws_lib.adjust(logits, rules, seen), [[1.0, -4.0, 0.0, 5.0]])


def test_logprob_is_that_of_the_model():
  got = draws_lib.logprob(LOGITS + 3, jnp.array([2]))
  np.testing.assert_allclose(got, np.log([0.2]), rtol=1e-5)


def test_many_rows_draw_as_few_do():
  random = np.random.default_rng(0)
  logits, positions = jnp.array(random.normal(size=(128, 31)), jnp.float32), jnp.arange(128)
  wanted = [
    Sampling(temperature=row % 3 / 2, top_k=1 + row % 7, top_p=0.9, seed=row) for row in range(128)
  ]
  part = draws_lib.draws({row: (each, 0) for row, each in enumerate(wanted)}, 128, 31)
  few = jax.tree.map(lambda x: x.reshape(4, 32, *x.shape[1:]), (logits, part, positions))
  few = jax.lax.map(lambda each: draws_lib.draw(*each)[0], few).reshape(128)
  np.testing.assert_array_equal(draws_lib.draw(logits, part, positions)[0], few)
