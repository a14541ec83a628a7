"""What `config.json` says, in the forms found in released checkpoints."""

import dataclasses

import pytest

from paged_jax.models import Rope, families

SMALL = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}


def test_old_and_new_forms_of_a_llama3_rope_agree():
  scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
  old = SMALL | {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": scaling}
  new = SMALL | {"model_type": "llama", "rope_parameters": scaling | {"rope_theta": 500_000.0}}
  assert families.read(old) == families.read(new)
  assert families.read(old).ropes[0] == Rope("llama3", 500_000.0, 8.0, 1.0, 4.0, 8192)


def test_llama_without_optional_fields_has_their_defaults():
  config = families.read(SMALL | {"model_type": "llama"})
  assert (config.num_kv_heads, config.head_dim, config.tied) == (4, 8, False)
  assert config.ropes == (Rope(),) * 2 and config.windows == (None, None)


def test_gemma3_alternates_five_local_layers_and_one_global():
  raw = SMALL | {"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": 512}
  raw |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
  raw |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
  config = families.read(raw)
  assert config.windows == ((512,) * 5 + (None,)) * 2
  assert config.ropes == ((Rope(base=1e4),) * 5 + (Rope("linear", 1e6, 8.0),)) * 2


def test_released_gemma3_multimodal_configuration_is_read_by_its_text_part():
  text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
  text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
  config = families.read({"model_type": "gemma3", "text_config": text, "vision_config": {}})
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
  assert config.vocab_size == 262_208 and config.tied and config.attention_scale == 1 / 16
  assert config.ropes[5] == Rope("linear", 1e6, 8.0) and config.ropes[0] == Rope()


def test_gemma2_starts_with_a_local_layer_and_caps_its_logits():
  config = families.read(SMALL | {"model_type": "gemma2", "sliding_window": 16})
  assert config.windows == (16, None)
  assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)


@pytest.mark.parametrize(
  ("changes", "windows"),
  [
    ({}, (None, None)),
    ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
    ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}, (None, None)),
  ],
)
def test_qwen_windows_begin_at_max_window_layers(changes, windows):
  assert families.read(SMALL | {"model_type": "qwen2"} | changes).windows == windows


def test_mistral_with_a_null_window_sees_everything():
  raw = SMALL | {"model_type": "mistral"}
  assert families.read(raw | {"sliding_window": None}).windows == (None, None)
  assert families.read(raw | {"sliding_window": 8}).windows == (8, 8)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only llama"),
    ({"model_type": None}, "model_type None"),
    ({"rope_scaling": {"type": "mrope"}}, "rope scaling 'mrope' is not supported, only default"),
    ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' needs factor"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised .* 'gptq'"),
    ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
    ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
    ({"attention_bias": True}, "attention_bias is not supported"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_attention_heads=4"),
    ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types must say"),
    ({"model_type": "gemma3", "text_config": []}, "text_config must be an object"),
  ],
)
def test_unsupported_configuration_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    families.read(SMALL | {"model_type": "llama"} | changes)


@pytest.mark.parametrize(
  "rope", [Rope(), Rope("linear", 500.0, 2.0), Rope("llama3", 5e5, 8.0, 1.0, 4.0, 4096)]
)
def test_written_llama_reads_back_the_same(rope):
  config = families.read(SMALL | {"model_type": "llama"})
  config = dataclasses.replace(config, ropes=(rope,) * 2, tied=True)
  assert families.read(families.write(config)) == config


def test_only_llamas_are_written():
  config = families.read(SMALL | {"model_type": "qwen2"})
  with pytest.raises(ValueError, match="only models of the llama family"):
    families.write(config)
