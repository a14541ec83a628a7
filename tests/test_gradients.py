"""Gradients through write, attend and gather are those of dense attention, or refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import paged_jax
from paged_jax import jitted, models

LAYERS, HEADS, DIM, PROMPT, STEPS = 2, 2, 4, 5, 4
CONFIG = paged_jax.CacheConfig(
  num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, num_pages=12, num_rows=3, page_size=4,
  max_length=16, dtype="float32",
)  # fmt: skip
Q, K, V = jax.random.normal(jax.random.key(0), (3, PROMPT, HEADS, DIM))


def prefilled(implementation=None, config=CONFIG):
  """A cache with garbage in its pages, and a plan for a prompt in row 1, padded in front."""
  cache = jitted.init(config)
  poison = jnp.full_like(cache.pages.kv, jnp.nan) if config.dtype == jnp.float32 else cache.pages.kv
  cache = paged_jax.Cache(cache.ledger, dataclasses.replace(cache.pages, kv=poison))
  cache, _ = jitted.extend(cache, np.array([0, PROMPT, 2], np.int32))
  rows = np.array([3] + [1] * PROMPT, np.int32)
  positions = np.array([0, *range(PROMPT)], np.int32)
  return cache, jitted.plan(cache, rows, positions, implementation=implementation)


def padded(x):
  return jnp.pad(x, ((1, 0), (0, 0), (0, 0)))


def dense(q, k, v, scale=DIM**-0.5, window=99):
  logits = jnp.einsum("bhd,chd->hbc", q, k) * scale
  age = jnp.arange(len(q))[:, None] - jnp.arange(len(k))[None]
  logits = jnp.where(((age >= 0) & (age < window))[None], logits, -1e30)
  return jnp.einsum("hbc,chd->bhd", jax.nn.softmax(logits), v)


wanted = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(dense(*x, window=3))), argnums=(0, 1, 2, 3)))


PADDED = dataclasses.replace(CONFIG, storage_head_dim=DIM + 3)


@pytest.mark.parametrize(
  ("implementation", "config", "transform"),
  [
    ("reference", CONFIG, jax.jit),
    ("xla", CONFIG, lambda f: f),
    ("xla", CONFIG, jax.checkpoint),
    ("xla", PADDED, jax.jit),
  ],
)
def test_gradients_of_write_and_attend_are_those_of_dense_attention(
  implementation, config, transform
):
  cache, plan = prefilled(implementation, config)

  @transform
  def paged(q, k, v, scale):
    full = paged_jax.write(cache, 1, padded(k), padded(v), plan)
    out = paged_jax.attend(full, 1, padded(q), plan, scale=scale, window=3)
    return jnp.sum(jnp.sin(out))

  got = jax.jit(jax.grad(paged, (0, 1, 2, 3)))(Q, K, V, 0.3)
  for mine, theirs in zip(got, wanted(Q, K, V, 0.3), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert np.abs(theirs).max() > 1e-3


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_of_keys_that_contain_values_are_those_of_both(implementation):
  cache, plan = prefilled(implementation, dataclasses.replace(CONFIG, value_dim=3))

  def paged(q, k):
    full = paged_jax.write(cache, 1, padded(k), None, plan)
    return jnp.sum(jnp.sin(paged_jax.attend(full, 1, padded(q), plan)))

  def by_hand(q, k):
    return jnp.sum(jnp.sin(dense(q, k, k[..., :3])))

  got, want = (jax.jit(jax.grad(f, (0, 1)))(Q, K) for f in (paged, by_hand))
  for mine, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=2e-5)


def generated(weights):
  """A prompt, then single steps with a fork in between: every verb of a decode loop."""
  cache, plan = prefilled("xla")
  q, k, v = (padded(x) for x in weights[:, :PROMPT])
  cache = paged_jax.write(cache, 0, k, v, plan)
  total = jnp.sum(paged_jax.attend(cache, 0, q, plan) ** 2)
  cache, _ = paged_jax.fork(cache, jnp.array([1, 3]), jnp.array([0, 3]))

  def step(carry, new):
    cache, total = carry
    cache, _ = paged_jax.extend(cache, jnp.array([1, 0, 0]))  # copies the shared page first
    plan = paged_jax.plan(cache, jnp.array([0, 3], jnp.int32), cache.lengths[:2] - 1)
    q, k, v = (jnp.stack([x, jnp.zeros_like(x)]) for x in new)
    cache = paged_jax.write(cache, 0, k, v, plan)
    return (cache, total + jnp.sum(paged_jax.attend(cache, 0, q, plan)[0] ** 2)), None

  (cache, total), _ = jax.lax.scan(step, (cache, total), weights[:, PROMPT:].swapaxes(0, 1))
  k, _ = paged_jax.gather(cache, 0, jnp.array([0, 1]), num_tokens=PROMPT + STEPS)
  return total + jnp.sum(k**3)


def by_hand(weights):
  q, k, v = weights
  return jnp.sum(dense(q, k, v) ** 2) + jnp.sum(k**3) + jnp.sum(k[:PROMPT] ** 3)


def test_gradients_of_a_whole_decode_loop_with_copies_on_write():
  weights = jax.random.normal(jax.random.key(1), (3, PROMPT + STEPS, HEADS, DIM))
  total, got = jax.jit(jax.value_and_grad(generated))(weights)
  by_hands, want = jax.jit(jax.value_and_grad(by_hand))(weights)
  np.testing.assert_allclose(total, by_hands, rtol=1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  ones = np.ones_like(weights)
  _, forward = jax.jit(lambda x: jax.jvp(generated, (x,), (ones,)))(weights)
  np.testing.assert_allclose(forward, np.sum(want), rtol=1e-4)


def test_pages_that_a_window_has_passed_leave_gradients_alone():
  config = dataclasses.replace(CONFIG, num_pages=4, num_layers=1, max_length=64)  # P > N

  def read(k, grows):
    cache, _ = paged_jax.extend(paged_jax.init(config), jnp.array([9, 0, 0]))
    cache, _ = paged_jax.slide(cache, jnp.array([9, 0, 0]))
    cache, _ = paged_jax.extend(cache, jnp.array([9, 0, 0]))
    plan = paged_jax.plan(cache, jnp.zeros(9, jnp.int32), jnp.arange(9, 18, dtype=jnp.int32))
    cache = paged_jax.write(cache, 0, k, k, plan)
    cache, _ = paged_jax.extend(cache, jnp.stack([grows, 0, 0]))
    return jnp.sum(paged_jax.gather(cache, 0, jnp.array([0]), num_tokens=18)[0] ** 2)

  k = jax.random.normal(jax.random.key(2), (9, HEADS, DIM))
  slope = jax.jit(jax.grad(read))
  for grows in (0, 2):
    np.testing.assert_allclose(slope(k, jnp.int32(grows)), 2 * k, rtol=1e-6)


def test_gradients_agree_with_differences():
  cache, plan = prefilled()

  def paged(q, k, v, sinks):
    full = paged_jax.write(cache, 0, padded(k), padded(v), plan)
    out, lse = paged_jax.attend(full, 0, padded(q), plan, softcap=2.0, sinks=sinks, return_lse=True)
    return out, jnp.where(jnp.isfinite(lse), lse, 0)

  check_grads(jax.jit(paged), (Q, K, V, jnp.array([0.3, -1.0])), order=1, atol=3e-2, rtol=3e-2)


def test_gradients_of_the_packaged_decoder_are_those_of_its_dense_pass():
  decoder = models.load(models.embedded(), jnp.float32)
  graph, state = jax.tree.flatten(decoder)[::-1]
  tokens = jnp.arange(7, dtype=jnp.int32)
  config = models.cache_config(decoder.config, num_pages=4, num_rows=2, page_size=4, max_length=16,
                               dtype="float32")  # fmt: skip
  cache, _ = jitted.extend(jitted.init(config), np.array([0, 7], np.int32))
  plan = jitted.plan(cache, np.full(7, 1, np.int32), tokens)

  def loss(logits):
    return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(6), tokens[1:]])

  def paged(state):
    model = jax.tree.unflatten(graph, state)
    return loss(model.logits(model(tokens, cache, plan)[0])[:6])

  def without(state):
    return loss(jax.tree.unflatten(graph, state).dense(tokens[None])[0, :6])

  got, want = jax.jit(jax.grad(paged))(state), jax.jit(jax.grad(without))(state)
  for mine, theirs in zip(got, want):
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("dtype", "stored", "message"),
  [("bfloat16", "uint16", "keep bfloat16 as uint16"), ("int8", "int8", "keep int8:"),
   ("float8_e4m3fn", "float8_e4m3fn", "keep float8_e4m3fn:")],
)  # fmt: skip
def test_what_is_kept_as_bits_or_in_8_is_refused_and_never_zero(dtype, stored, message):
  config = paged_jax.CacheConfig(
    num_layers=1, num_kv_heads=HEADS, head_dim=DIM, num_pages=4, num_rows=3, page_size=4,
    max_length=16, dtype=dtype, storage_dtype=stored,
  )  # fmt: skip
  cache, plan = prefilled(config=config)

  def paged(k):
    full = paged_jax.write(cache, 0, padded(k), padded(V), plan)
    return jnp.sum(paged_jax.attend(full, 0, padded(Q), plan))

  with pytest.raises(NotImplementedError, match=message + ".* `Decoder.dense`"):
    jax.eval_shape(jax.grad(paged), K)
  slope = jax.eval_shape(
    jax.grad(lambda q: jnp.sum(paged_jax.attend(cache, 0, padded(q), plan) ** 2)), Q
  )
  assert slope.shape == Q.shape  # that of queries passes through no bits
