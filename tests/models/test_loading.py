"""Checkpoints that load, checkpoints that must not, and what loading costs."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from paged_jax import models

GOLDENS = Path(__file__).parent / "goldens"
LLAMA, SHARDED, GEMMA3 = GOLDENS / "llama2", GOLDENS / "llama3", GOLDENS / "gemma3"
GEMMA4 = GOLDENS / "gemma4"


@pytest.fixture
def copy(tmp_path):
  """A function that copies a golden folder to where a test may spoil it."""
  return lambda folder: Path(shutil.copytree(folder, tmp_path / folder.name))


def tensors(folder):
  """All tensors of an unsharded checkpoint."""
  return safetensors.numpy.load_file(folder / "model.safetensors")


def spoil(folder, **changes):
  """Writes the checkpoint again; a tensor changed to None goes."""
  kept = {k: v for k, v in (tensors(folder) | changes).items() if v is not None}
  safetensors.numpy.save_file(kept, folder / "model.safetensors")


def weights(decoder):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(decoder)))


def test_layers_are_stacked_in_order():
  decoder = models.load(LLAMA)
  stored = tensors(LLAMA)
  for i in range(2):
    np.testing.assert_array_equal(
      decoder.layers.mlp.up_proj.weight[i], stored[f"model.layers.{i}.mlp.up_proj.weight"]
    )


def test_dtype_is_as_asked():
  assert models.load(LLAMA).norm.weight.dtype == jnp.float32
  assert models.load(LLAMA, jnp.bfloat16).norm.weight.dtype == jnp.bfloat16


def test_saved_llama_loads_the_same(tmp_path):
  decoder = models.load(LLAMA, "bfloat16")
  models.save(decoder, tmp_path / "saved")
  again = models.load(tmp_path / "saved")
  jax.tree.map(np.testing.assert_array_equal, weights(again), weights(decoder))
  assert again.config == decoder.config and again.norm.weight.dtype == jnp.bfloat16


def test_text_part_of_a_multimodal_checkpoint_loads(copy):
  for prefix in ("language_model.model.", "model.language_model."):
    folder = copy(GEMMA3)
    raw = json.loads((folder / "config.json").read_text())
    raw = {"model_type": "gemma3", "dtype": "float32", "text_config": raw}
    (folder / "config.json").write_text(json.dumps(raw))
    nested = {k.replace("model.", prefix, 1): v for k, v in tensors(folder).items()}
    nested["vision_tower.patch.weight"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(nested, folder / "model.safetensors")
    loaded, plain = models.load(folder), models.load(GEMMA3)
    jax.tree.map(np.testing.assert_array_equal, weights(loaded), weights(plain))
    shutil.rmtree(folder)


def test_buffers_and_the_copy_of_a_tied_head_are_ignored(copy):
  folder = copy(GOLDENS / "llama_linear")
  extra = {"lm_head.weight": tensors(folder)["model.embed_tokens.weight"]}
  extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
  spoil(folder, **extra)
  assert models.load(folder).lm_head is None


def test_layers_of_several_shapes_are_stacked_by_shape_in_order():
  decoder, stored = models.load(GEMMA4), tensors(GEMMA4)
  assert decoder.config.stacks == ((0, 1, 3), (2,), (4,), (5, 6))
  for stack, layers in zip(decoder.layers, decoder.config.stacks):
    for j, i in enumerate(layers):
      name = f"model.layers.{i}.self_attn.q_proj.weight"
      np.testing.assert_array_equal(stack.self_attn.q_proj.weight[j], stored[name])


def test_keys_of_a_layer_that_reads_those_of_another_are_ignored(copy):
  folder = copy(GEMMA4)
  spoil(folder, **{"model.layers.5.self_attn.k_proj.weight": np.zeros(3, np.float32)})
  assert models.load(folder).config.sources[5] == 2
  spoil(folder, **{"model.layers.3.self_attn.k_proj.weight": np.zeros(3, np.float32)})
  with pytest.raises(ValueError, match=r"shape of 'model\.layers\.3\.self_attn\.k_proj\.weight'"):
    models.load(folder)


def test_loading_allocates_little_more_than_the_weights(tmp_path):
  config = models.DecoderConfig(
    vocab_size=512, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=4,
    num_kv_heads=4, head_dim=64, max_length=64, windows=(None,) * 6, ropes=(models.Rope(),) * 6,
  )  # fmt: skip
  models.save(models.Decoder(config, rngs=nnx.Rngs(0)), tmp_path)
  size = (tmp_path / "model.safetensors").stat().st_size
  tracemalloc.start()
  decoder = models.load(tmp_path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  largest = 4 * 1024 * 256  # bytes of one tensor
  assert size > 20 * largest
  assert peak < size + 4 * largest
  del decoder


def test_eos_tokens_come_from_the_generation_config_first(copy):
  folder = copy(LLAMA)
  (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
  assert models.eos_tokens(folder) == (5, 6)
  (folder / "generation_config.json").unlink()
  assert models.eos_tokens(folder) == (2,)
  (folder / "config.json").write_text("{}")
  assert models.eos_tokens(folder) == ()


def test_tokenizer_is_none_where_there_is_none():
  assert models.tokenizer(LLAMA) is None


def test_damaged_tokenizer_is_named(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
    models.tokenizer(tmp_path)


def test_cache_config_follows_the_model():
  config = models.load(GOLDENS / "mistral").config
  cache = models.cache_config(config, num_pages=8, num_rows=2)
  assert (cache.num_layers, cache.num_kv_heads, cache.head_dim) == (2, 2, 16)
  assert (cache.max_length, cache.dtype) == (128, jnp.bfloat16)


def test_unknown_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere is no checkpoint: it has no config\.json"):
    models.load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "\udcff", "[]"])
def test_invalid_json_is_named(copy, content):
  folder = copy(LLAMA)
  (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
  with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|must hold)"):
    models.load(folder)


def test_missing_file_of_tensors_is_named(copy):
  folder = copy(LLAMA)
  (folder / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
    models.load(folder)


def test_missing_shard_is_named(copy):
  folder = copy(SHARDED)
  (folder / "model-00002-of-00004.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="model-00002-of-00004"):
    models.load(folder)


def test_index_without_a_weight_map_is_named(copy):
  folder = copy(SHARDED)
  (folder / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
    models.load(folder)


@pytest.mark.parametrize("cut", [4, 100, -8])
def test_corrupted_safetensors_is_named(copy, cut):
  folder = copy(LLAMA)
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:cut])
  with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
    models.load(folder)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("model.norm.weight", None, r"lacks 1 tensors, the first is 'model\.norm\.weight'"),
    ("score.weight", np.zeros(3, np.float32), "unexpected tensor 'score.weight'"),
    ("model.norm.weight", np.zeros(3, np.float32), r"shape .* must be \(32,\), got \(3,\)"),
    ("model.norm.weight", np.zeros(32, np.int8), "dtype .* must be F32 or BF16 or F16, got I8"),
  ],
)
def test_wrong_tensor_is_named(copy, name, value, message):
  folder = copy(LLAMA)
  spoil(folder, **{name: value})
  with pytest.raises(ValueError, match=message):
    models.load(folder)


def test_embedded_model_fits_the_package():
  folder = models.embedded()
  assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
  decoder = models.load(folder)
  tokenizer = models.tokenizer(folder)
  assert tokenizer.get_vocab_size() == decoder.config.vocab_size == 512
  text = "naïve ☃\n\x00"
  assert tokenizer.decode(tokenizer.encode(text).ids) == text
  assert models.eos_tokens(folder) == ()
