"""The decoder by itself: paged against dense, and its small parts by hand."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paged_jax
from paged_jax import groups, jitted, models, testing
from paged_jax.models import ropes

CONFIG = models.DecoderConfig(
  vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
  head_dim=8, max_length=64, windows=(None, 5, 9), ropes=(models.Rope(),) * 3, qk_norm=True,
)  # fmt: skip


SIZES = {"num_pages": 16, "num_rows": 3, "page_size": 4, "max_length": 32}


def small(**changes):
  return models.Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def layered(windows, **changes):
  """A decoder whose layers see these windows."""
  changes |= {"ropes": tuple(models.Rope(base=1e4 if w is None else 1e2) for w in windows)}
  return small(num_layers=len(windows), windows=windows, **changes)


def cache_of(decoder, **changes):
  """The cache of a decoder, or the tuple of its groups' caches."""
  return paged_jax.init(
    models.cache_config(decoder.config, **{"dtype": jnp.float32} | SIZES | changes)
  )


def step(decoder, cache, tokens, rows, positions):
  """The caches and hidden states after one ragged batch."""
  counts = jnp.zeros(groups.each(cache)[0].lengths.shape, jnp.int32).at[rows].add(1, mode="drop")
  cache, _ = paged_jax.extend(cache, counts)
  x, cache = decoder(tokens, cache, paged_jax.plan(cache, rows, positions))
  return cache, x


def test_paged_equals_dense_for_ragged_rows_with_padding():
  decoder = small()
  lengths = np.int32([7, 0, 19])
  tokens = np.random.default_rng(0).integers(64, size=(3, 19), dtype=np.int32)
  cache = cache_of(decoder, uniform=True)
  cache, _ = jitted.extend(cache, lengths)
  rows = np.repeat(np.int32([2, 0, 3]), [19, 7, 6])  # row 3 is padding
  positions = np.concatenate([np.arange(19), np.arange(7), np.zeros(6)]).astype(np.int32)
  batch = np.concatenate([tokens[2], tokens[0, :7], np.zeros(6, np.int32)])

  x, _ = jax.jit(decoder)(batch, cache, jitted.plan(cache, rows, positions))
  paged, dense = jax.jit(decoder.logits)(x), jax.jit(decoder.dense)(tokens)

  np.testing.assert_allclose(paged[:19], dense[2], atol=1e-5)
  np.testing.assert_allclose(paged[19:26], dense[0, :7], atol=1e-5)
  assert np.isfinite(paged).all()


WIDE = models.Shape(1, 16, 24, values=False)
READS = (models.Shape(2, 8, 32, own=False), models.Shape(1, 16, 32, own=False))
DIFFERENT = {  # a small Gemma 4: some layers have other heads, and the last ones no keys
  "shapes": (models.Shape(2, 8, 24), WIDE) * 2 + READS * 2,
  "value_norm": True, "layer_scalars": True, "layer_input_size": 6, "layer_input_vocab_size": 64,
}  # fmt: skip
LAYERS = {  # windows of the layers of a model
  "a pattern of three groups, and a rest": (5, 5, None, 1) * 2 + (5,),
  "no pattern": (None, 5, 9),
}


@pytest.mark.parametrize("name", LAYERS)
def test_groups_of_caches_give_what_one_cache_gives(name):
  decoder = layered(LAYERS[name])
  rows = np.repeat(np.int32([2, 0, 3]), [19, 7, 6])  # row 3 is padding
  positions = np.concatenate([np.arange(19), np.arange(7), np.zeros(6)]).astype(np.int32)
  tokens = np.random.default_rng(0).integers(64, size=32, dtype=np.int32)
  run = jax.jit(lambda cache: step(decoder, cache, tokens, rows, positions)[1])
  grouped, uniform = run(cache_of(decoder)), run(cache_of(decoder, uniform=True))
  dense = jax.jit(decoder.dense)(tokens[None, :19])[0]
  np.testing.assert_allclose(grouped, uniform, atol=1e-5)
  np.testing.assert_allclose(jax.jit(decoder.logits)(grouped)[:19], dense, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_layers_write_their_pools_in_place(grouped):
  decoder = layered((5, 5, None) * 2 + (5,))
  cache = cache_of(decoder, uniform=not grouped, num_pages=64, num_rows=4)
  rows = jnp.arange(4, dtype=jnp.int32)

  def steps(cache):
    def body(cache, _):
      return step(decoder, cache, rows, rows, groups.each(cache)[0].lengths)

    return jax.lax.scan(body, cache, length=3)

  testing.assert_in_place(steps, cache)


def test_layers_of_several_shapes_read_what_they_should():
  decoder = layered((5, None) * 4, **DIFFERENT)
  assert decoder.config.sources == (0, 1, 2, 3, 2, 3, 2, 3)
  tokens = np.random.default_rng(0).integers(64, size=23, dtype=np.int32)
  rows, positions = np.zeros(23, np.int32), np.arange(23, dtype=np.int32)
  _, x = jax.jit(lambda cache: step(decoder, cache, tokens, rows, positions))(cache_of(decoder))
  paged, dense = jax.jit(decoder.logits)(x), jax.jit(decoder.dense)(tokens[None])[0]
  np.testing.assert_allclose(paged, dense, atol=1e-4)
  with pytest.raises(ValueError, match="the layers need a cache per group: they have 2 shapes"):
    cache_of(decoder, uniform=True)


def test_program_does_not_grow_with_the_layers_of_a_pattern():
  def size(repeats):
    decoder = layered((5, 5, 5, None) * repeats + (5,))
    rows = jnp.zeros(4, jnp.int32)
    call = jax.make_jaxpr(lambda cache: step(decoder, cache, rows, rows, jnp.arange(4)))
    return str(call(cache_of(decoder))).count("dot_general")

  assert size(2) == size(8)


def test_caches_of_another_model_are_refused():
  decoder = layered((5, None, None))
  caches = cache_of(decoder)
  rows = jnp.zeros(1, jnp.int32)
  plan = jitted.plan(caches[0], rows, rows)
  message = "groups of {} layers, got caches of {} layers and {} plans"
  for cache, plans, numbers in (
    (caches, (plan,), ([2, 1], [2, 1], 1)),
    (caches[::-1], (plan, plan), ([2, 1], [1, 2], 2)),
    (caches[0], plan, ([3], [2], 1)),
  ):
    with pytest.raises(ValueError, match=re.escape(message.format(*numbers))):
      decoder(rows, cache, plans)


def test_decoder_compiles_once_for_all_batches_of_a_size():
  decoder = small()
  cache = cache_of(decoder, num_rows=2, uniform=True)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(cache, tokens):
    cache, _ = paged_jax.extend(cache, jnp.ones(2, jnp.int32))
    plan = paged_jax.plan(cache, jnp.arange(2, dtype=jnp.int32), cache.lengths - 1)
    return decoder(tokens, cache, plan)

  for _ in range(6):
    x, cache = step(cache, jnp.array([3, 4], jnp.int32))
  assert cache.lengths.tolist() == [6, 6] and x.shape == (2, 32)


def test_bfloat16_weights_give_bfloat16_states_and_float32_logits():
  decoder = small()
  nnx.update(decoder, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(decoder)))
  cache = cache_of(decoder, dtype=jnp.bfloat16, num_rows=1, uniform=True)
  cache, _ = jitted.extend(cache, jnp.array([3], jnp.int32))
  plan = jitted.plan(cache, jnp.zeros(3, jnp.int32), jnp.arange(3, dtype=jnp.int32))
  x, _ = jax.jit(decoder)(jnp.arange(3, dtype=jnp.int32), cache, plan)
  logits = jax.jit(decoder.logits)(x)
  assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert np.isfinite(logits).all()


LATENT = models.Latent(12, 8, 4, 6, query_rank=10)
KINDS = {
  "dense": {"qkv_bias": True, "post_norms": True},
  "experts": {"experts": models.Experts(4, 2), "sinks": True, "output_bias": True},
  "latent": {"latent": LATENT, "num_kv_heads": 1, "head_dim": 16},
  "shapes": {"num_layers": 8, "windows": (5, None) * 4, "ropes": (models.Rope(),) * 8} | DIFFERENT,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_keeps_bfloat16(name):
  decoder = small(**KINDS[name])
  nnx.update(decoder, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(decoder)))
  rows = jnp.zeros(3, jnp.int32)
  cache = jax.eval_shape(lambda: cache_of(decoder, dtype=jnp.bfloat16))
  after, x = jax.eval_shape(lambda cache: step(decoder, cache, rows, rows, rows), cache)
  dense = jax.eval_shape(decoder.dense, rows[None])
  assert (x.dtype, dense.dtype) == (jnp.bfloat16, jnp.float32)
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, cache)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_every_parameter(name):
  graph, params = nnx.split(small(**KINDS[name]))
  tokens = np.arange(16, dtype=np.int32)[None]

  def loss(params):
    return jnp.square(nnx.merge(graph, params).dense(tokens)).sum()

  for path, leaf in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
    assert np.abs(leaf[...]).max() > 0, path


def test_token_outside_the_vocabulary_shows_as_nan():
  logits = jax.jit(small().dense)(np.int32([[3], [64]]))
  assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_rotation_by_a_right_angle_swaps_the_halves():
  x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
  rotated = ropes.rotate(x, jnp.zeros((1, 2)), jnp.ones((1, 2)))
  np.testing.assert_allclose(rotated, [[[-3.0, -4.0, 1.0, 2.0]]])


def test_llama3_rope_keeps_fast_pairs_and_divides_slow_ones():
  plain = models.Rope(base=10_000.0).frequencies(64)
  scaled = models.Rope("llama3", 10_000.0, 8.0, 1.0, 4.0, 1024).frequencies(64)
  np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
  np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)
  assert np.all((scaled <= plain * 1.0001) & (scaled >= plain / 8.0001))


@pytest.mark.parametrize(
  "changes",
  [
    {"num_kv_heads": 3},
    {"head_dim": 7},
    {"windows": (None,)},
    {"experts": models.Experts(4, 5)},
    {"latent": models.Latent(4, 4, 3, 4)},
    {"latent": models.Latent(4, 4, 4, 4)},
    {"shapes": (models.Shape(2, 8, 48),)},
    {"shapes": (models.Shape(2, 8, 48, own=False),) + (models.Shape(2, 8, 48),) * 2},
  ],
  ids=str,
)
def test_config_that_does_not_fit_together_is_refused(changes):
  with pytest.raises(ValueError, match=next(iter(changes)).removesuffix("s")):
    dataclasses.replace(CONFIG, **changes)
