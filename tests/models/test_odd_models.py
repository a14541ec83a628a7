"""Our decoder against transformers, on sparse and odd configurations (see odd_models.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import odd_models
import pytest
from flax import nnx

import paged_jax
from paged_jax import models
from paged_jax.models import decoder as decoder_lib
from paged_jax.models import families, loading

GOLDENS = np.load(Path(__file__).parent / "goldens" / "odd.npz")
PAGED = (
  "mistral_sparse", "qwen2_window", "gemma3_yarn", "yarn_deepseek", "dynamic", "longrope",
  "deepseek_plain", "gemma4_keys_are_values", "gemma4_repeated",
)  # fmt: skip


def shapes(config):
  """Shapes of a checkpoint's tensors, as we understand its configuration."""
  leaves = nnx.to_flat_state(nnx.state(decoder_lib.abstract(config)))
  arrays = {path: np.broadcast_to(np.int8(0), leaf.shape) for path, leaf in leaves}
  return {name: part.shape for name, part in loading.parts(arrays, config).items()}


def load(name, folder):
  raw = odd_models.CONFIGS[name]
  odd_models.write(folder, raw, shapes(families.read(raw)))
  return models.load(folder)


@pytest.mark.parametrize("name", odd_models.CONFIGS)
def test_dense_decoder_reads_odd_configuration_as_transformers(name, tmp_path):
  decoder = load(name, tmp_path)
  logits = jax.jit(decoder.dense)(odd_models.TOKENS[None])[0]
  np.testing.assert_allclose(logits[odd_models.PLACES], GOLDENS[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PAGED)
def test_paged_decoder_reads_odd_configuration_as_transformers(name, tmp_path):
  decoder = load(name, tmp_path)
  sizes = {"num_pages": 12, "num_rows": 1, "page_size": 4, "max_length": odd_models.LENGTH}
  config = models.cache_config(decoder.config, dtype=jnp.float32, **sizes)
  cache = paged_jax.init(config)

  @jax.jit
  def run(cache, tokens):
    cache, _ = paged_jax.extend(cache, jnp.array([len(tokens)], jnp.int32))
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    plan = paged_jax.plan(cache, jnp.zeros(len(tokens), jnp.int32), positions)
    return decoder.logits(decoder(tokens, cache, plan)[0])

  logits = run(cache, odd_models.TOKENS)
  np.testing.assert_allclose(logits[odd_models.PLACES], GOLDENS[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", odd_models.BEYOND)
def test_cache_ends_where_a_rope_begins_to_depend_on_the_length(name):
  config = families.read(odd_models.CONFIGS[name])
  assert config.max_length == 16
  assert models.cache_config(config, num_pages=8, num_rows=1).max_length == 16
  with pytest.raises(ValueError, match="max_length must be at most 16 with rope scaling"):
    models.cache_config(config, num_pages=8, num_rows=1, max_length=17)


@pytest.mark.parametrize("name", odd_models.CONFIGS)
@pytest.mark.filterwarnings("default")  # of torch and transformers
def test_goldens_of_odd_models_are_what_transformers_computes_now(name, tmp_path):
  pytest.importorskip("torch", reason="the live comparison needs torch")
  pytest.importorskip("transformers", reason="the live comparison needs it")
  logits = odd_models.judged(name, tmp_path)[odd_models.PLACES]
  np.testing.assert_allclose(GOLDENS[name], logits, rtol=0, atol=1e-4)
