"""Our decoder against transformers, on tiny random checkpoints (see make_goldens.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import paged_jax
from paged_jax import groups, models

GOLDENS = Path(__file__).parent / "goldens"
CHUNK = 6  # tokens of the prompt fed at once, across pages of 4
ROW, OTHER, NUM_ROWS = 2, 0, 3
UNIFORM = ("qwen3", "gemma2", "gemma3", "gpt_oss")  # of several groups, but one shape


def make_cache(config, platform="cpu", uniform=False):
  """The caches of a model: a tuple of them, or a uniform one."""
  sizes = {"num_pages": 40, "num_rows": NUM_ROWS, "page_size": 4, "max_length": 64}
  made = models.cache_config(config, dtype=jnp.float32, uniform=uniform, **sizes)
  stored = [each.stored_for(platform) for each in groups.each(made)]
  return paged_jax.init(groups.like(made, stored))


def prefill(decoder, cache, prompt):
  """Logits of the prompt in ROW, fed in chunks beside its reverse in OTHER."""
  run = jax.jit(lambda cache, *args: step(decoder, cache, *args))
  rows = np.repeat(np.int32([OTHER, ROW]), CHUNK)
  logits = []
  for positions in np.arange(len(prompt), dtype=np.int32).reshape(-1, CHUNK):
    tokens = np.concatenate([prompt[::-1][positions], prompt[positions]])
    values, cache = run(cache, tokens, rows, np.tile(positions, 2))
    logits.append(values[CHUNK:])
  return np.concatenate(logits), cache


def step(decoder, cache, tokens, rows, positions):
  """Logits of one ragged batch."""
  counts = jnp.zeros(NUM_ROWS, jnp.int32).at[rows].add(1)
  cache, info = paged_jax.extend(cache, counts)
  x, cache = decoder(tokens, cache, paged_jax.plan(cache, rows, positions))
  return jnp.where(info.ok.all(), decoder.logits(x), jnp.nan), cache


def decode(decoder, cache, token, steps):
  """Greedy tokens and the logits that chose them, all steps in one program."""

  def body(carry, _):
    cache, token = carry
    rows = jnp.array([ROW], jnp.int32)
    logits, cache = step(decoder, cache, token, rows, groups.each(cache)[0].lengths[rows])
    chosen = logits.argmax(-1).astype(jnp.int32)
    return (cache, chosen), (token[0], logits[0])

  _, (tokens, logits) = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps))(
    (cache, jnp.array([token], jnp.int32))
  )
  return np.asarray(tokens), np.asarray(logits)


@pytest.mark.once
@pytest.mark.parametrize(
  ("name", "uniform"),
  [(name, False) for name in tiny_models.CONFIGS] + [(x, True) for x in UNIFORM],
)
def test_paged_decoder_equals_transformers(name, uniform):
  golden = np.load(GOLDENS / name / "golden.npz")
  decoder = models.load(GOLDENS / name)
  prompt = golden["tokens"][: tiny_models.PROMPT]

  cache = make_cache(decoder.config, uniform=uniform)
  logits, cache = prefill(decoder, cache, prompt)
  tokens, more = decode(decoder, cache, logits[-1].argmax(), tiny_models.STEPS)

  np.testing.assert_array_equal(tokens, golden["tokens"][tiny_models.PROMPT :])
  logits = np.concatenate([logits, more])
  np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_cache_stored_for_another_platform_gives_the_same_text(platform):
  golden = np.load(GOLDENS / "llama2" / "golden.npz")
  decoder = models.load(GOLDENS / "llama2")
  cache = make_cache(decoder.config, platform)
  assert cache.pages.head_dim == 8 and cache.pages.kv.shape[-1] > 16
  logits, cache = prefill(decoder, cache, golden["tokens"][: tiny_models.PROMPT])
  tokens, more = decode(decoder, cache, logits[-1].argmax(), tiny_models.STEPS)
  np.testing.assert_array_equal(tokens, golden["tokens"][tiny_models.PROMPT :])
  logits = np.concatenate([logits, more])
  np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_dense_decoder_equals_transformers(name):
  golden = np.load(GOLDENS / name / "golden.npz")
  decoder = models.load(GOLDENS / name)
  logits = jax.jit(decoder.dense)(golden["tokens"][None])[0]
  np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
@pytest.mark.filterwarnings("default")  # of torch and transformers
def test_paged_decoder_equals_live_transformers(name):
  tokens = np.random.default_rng(7).integers(128, size=tiny_models.PROMPT, dtype=np.int32)
  want = live(GOLDENS / name, tokens)  # first: it may skip the test
  decoder = models.load(GOLDENS / name)
  logits, _ = prefill(decoder, make_cache(decoder.config), tokens)
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("default")  # of torch and transformers
def test_dense_embedded_model_equals_live_transformers():
  tokens = np.int32(models.tokenizer(models.embedded()).encode("ROMEO:\nWhat light is").ids)
  want = live(models.embedded(), tokens)  # first: it may skip the test
  logits = models.load(models.embedded(), jnp.float32).dense(tokens[None])[0]
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)


def live(folder, tokens):
  """What transformers computes now."""
  torch = pytest.importorskip("torch", reason="the live comparison needs torch")
  transformers = pytest.importorskip("transformers", reason="the live comparison needs it")
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager", dtype=torch.float32
  )
  with torch.no_grad():
    return model(torch.tensor(tokens[None], dtype=torch.int64)).logits[0].numpy()
