"""Sparse and odd configurations of each family, as released ones are; weights come from a seed.

`transformers` is the judge: `goldens/odd.npz` has the logits that it computes (see make_goldens.py).
"""

import json

import numpy as np
import safetensors.numpy

LENGTH = 40  # tokens of a text
SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA = GROUPED | {"model_type": "llama"}
GEMMA = GROUPED | {"head_dim": 16}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "sliding_window": 7, "sliding_window_pattern": 2}
OSS = GROUPED | {
  "model_type": "gpt_oss",
  "num_local_experts": 4,
  "sliding_window": 7,
  "head_dim": 8,
}
PART = {
  "rope_type": "proportional",
  "partial_rotary_factor": 0.6,
  "factor": 2.0,
  "rope_theta": 50.0,
}
SLOW = {"rope_type": "linear", "factor": 4.0, "rope_theta": 77.0}
GEMMA4 = GEMMA | {"model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 16}
GEMMA4 |= {"sliding_window": 5, "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 4.0}
LONG |= {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 5.0, 8.0]}
SHORT = LONG | {"original_max_position_embeddings": 16}  # our text is a long one
LINEAR = {"rope_type": "linear", "factor": 4.0}
MLA = SIZES | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "first_k_dense_replace": 2}
MLA |= {"kv_lora_rank": 12, "q_lora_rank": 10, "v_head_dim": 6, "qk_nope_head_dim": 4}
MLA |= {"qk_rope_head_dim": 8}


def llama(**rope):
  """A Llama with this `rope_scaling`."""
  return LLAMA | {"rope_scaling": rope}


CONFIGS = {
  # what is left out, or null
  "llama_sparse": SIZES | {"model_type": "llama"},
  "llama_null": SIZES | {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
  "mistral_sparse": SIZES | {"model_type": "mistral", "num_attention_heads": 8},
  "mistral_null": GROUPED | {"model_type": "mistral", "sliding_window": None, "head_dim": None},
  "mistral_biased": GROUPED | {"model_type": "mistral", "attention_bias": True, "head_dim": 6},
  "qwen2_sparse": GROUPED | {"model_type": "qwen2"},
  "qwen2_null": SIZES | {"model_type": "qwen2", "num_key_value_heads": None},
  "qwen2_window": GROUPED
  | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "head_dim": 6}
  | {"max_window_layers": -1, "attention_bias": True},
  "qwen2_no_window": GROUPED
  | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None},
  "qwen3_sparse": GROUPED | {"model_type": "qwen3"},
  "qwen3_listed": GROUPED
  | {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "head_dim": 8}
  | {"layer_types": ["sliding_attention", "full_attention"]},
  "gemma2_sparse": GROUPED | {"model_type": "gemma2", "head_dim": 16},
  "gemma2_listed": GEMMA
  | {"model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 4}
  | {"layer_types": ["attention", "sliding_attention"], "attn_logit_softcapping": None},
  "gemma3_sparse": GEMMA | {"model_type": "gemma3_text"},
  "gemma3_caps": GEMMA3 | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
  "gemma3_untied": GEMMA3 | {"tie_word_embeddings": False},
  "gpt_oss_sparse": OSS,
  "gpt_oss_unbiased": OSS | {"attention_bias": False, "swiglu_limit": 0.5, "swiglu_alpha": 1.0},
  "gpt_oss_old": OSS
  | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False}, "rope_theta": 999.0}
  | {"layer_types": ["full_attention", "sliding_attention"]},
  "deepseek_plain": MLA | {"q_lora_rank": None, "rope_interleave": False},
  "deepseek_null": MLA | {"num_key_value_heads": None, "rope_interleave": None},
  "deepseek_linear": MLA | {"rope_scaling": LINEAR | {"mscale_all_dim": 0.5}},
  "deepseek_yarn": MLA | {"rope_scaling": YARN | {"mscale": 0.7}, "rms_norm_eps": 1e-3},
  "gemma4_sparse": GEMMA4,
  "gemma4_keys_are_values": GEMMA4
  | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
  "gemma4_shared": GEMMA4
  | {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6}
  | {
    "num_kv_shared_layers": 3,
    "tie_word_embeddings": False,
    "use_bidirectional_attention": "vision",
  },
  "gemma4_repeated": GEMMA4
  | {"layer_types": ["sliding_attention", "full_attention"] * 4, "num_hidden_layers": 8}
  | {"num_kv_shared_layers": 4, "num_key_value_heads": 1},
  "gemma4_last_is_full": GEMMA4 | {"layer_types": ["full_attention", "sliding_attention"]},
  "gemma4_per_layer": GEMMA4
  | {"per_layer_config": {"1": {"head_dim": 12, "num_key_value_heads": 4}}},
  "gemma4_ropes": GEMMA4 | {"rope_parameters": {"full_attention": PART, "sliding_attention": SLOW}},
  "llama_proportional": llama(rope_type="proportional", partial_rotary_factor=0.5),
  # what is said elsewhere
  "llama_flat": LLAMA | {"rope_parameters": LINEAR, "rope_theta": 77.0},
  "llama_old_type": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 77},
  "llama_both": LLAMA | {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 2.0}},
  "llama_both_types": llama(rope_type="default", type="linear", factor=4.0),
  "llama_nested": LLAMA | {"rope_parameters": {"full_attention": LINEAR}},
  "gemma3_rope_scaling": GEMMA3
  | {"rope_scaling": LINEAR, "rope_theta": 123.0, "rope_local_base_freq": 7.0},
  "gemma3_old_type": GEMMA3 | {"rope_scaling": {"type": "linear", "factor": 4.0}},
  "gemma3_flat": GEMMA3 | {"rope_parameters": LINEAR | {"rope_theta": 77.0}},
  "gemma3_nested": GEMMA3
  | {"rope_parameters": {"full_attention": {"type": "linear", "factor": 4.0}}, "rope_theta": 55.0},
  "gemma3_nested_old": GEMMA3
  | {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}, "rope_scaling": LINEAR},
  "gemma3_yarn": GEMMA3
  | {"rope_parameters": {"full_attention": YARN | {"truncate": False}, "sliding_attention": None}},
  # scalings
  "yarn": llama(**YARN),
  "yarn_top_level": LLAMA | {"rope_scaling": YARN, "original_max_position_embeddings": 8},
  "yarn_no_length": LLAMA
  | {"rope_scaling": {"type": "yarn", "factor": 8.0}, "max_position_embeddings": 64},
  "yarn_no_factor": LLAMA
  | {"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": 4096},
  "yarn_deepseek": llama(**YARN, mscale=1.0, mscale_all_dim=0.707, beta_fast=4, beta_slow=0.5),
  "yarn_mscale": llama(**YARN, mscale=0.707, mscale_all_dim=0, beta_fast=0),
  "yarn_attention": llama(**YARN, attention_factor=2, mscale=1.0, mscale_all_dim=0.7),
  "yarn_exact": llama(**YARN, truncate=False),
  "yarn_truncate_null": llama(**YARN, truncate=None),
  "yarn_qwen3": GROUPED | {"model_type": "qwen3", "head_dim": 16, "rope_scaling": YARN},
  "yarn_gemma2": GEMMA | {"model_type": "gemma2", "rope_scaling": YARN},
  "dynamic": llama(rope_type="dynamic", factor=4.0, original_max_position_embeddings=8),
  "dynamic_beyond": llama(type="dynamic", factor=4.0) | {"max_position_embeddings": 16},
  "longrope": llama(**LONG),
  "longrope_beyond": llama(**SHORT),
  "longrope_ratio": LLAMA
  | {"rope_scaling": {k: v for k, v in LONG.items() if k != "factor"}}
  | {"original_max_position_embeddings": 64, "max_position_embeddings": 512},
  "longrope_attention": llama(**LONG, attention_factor=1.25),
  "llama3_no_length": LLAMA
  | {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}}
  | {"max_position_embeddings": 32, "rope_theta": 1000.0},
}
BEYOND = ("dynamic_beyond", "longrope_beyond")  # too long for a cache
PLACES = np.array([0, 5, 17, 30, 39])  # tokens whose logits are kept
TOKENS = np.random.default_rng(3).integers(128, size=LENGTH).astype(np.int32)


def write(folder, raw, shapes):
  """A checkpoint of this configuration, with weights of these shapes."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(raw))
  weights = {name: weight(name, shape) for name, shape in shapes.items()}
  safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def weight(name, shape):
  """f32 weights that depend on the name alone."""
  rng = np.random.default_rng(list(name.encode()))
  values = rng.normal(size=shape).astype(np.float32)
  return np.float32(1) + np.float32(0.3) * values if len(shape) == 1 else np.float32(0.2) * values


def judged(name, folder):
  """What transformers computes from the configuration of this name, f32[LENGTH,V]."""
  import torch
  import transformers

  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
  config = transformers.AutoConfig.from_pretrained(folder)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
  stored = [*model.named_parameters(), *model.named_buffers()]
  shapes = {n: tuple(x.shape) for n, x in stored if n in model.state_dict()}
  write(folder, CONFIGS[name], shapes)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
  with torch.no_grad():
    tokens = torch.tensor(TOKENS[None], dtype=torch.int64)
    return model(tokens, use_cache=False).logits[0].float().numpy()
