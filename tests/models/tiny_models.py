"""Tiny models of each family, as Hugging Face describes them."""

SMALL = {
  "vocab_size": 128,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "num_hidden_layers": 2,
  "max_position_embeddings": 128,
  "initializer_range": 0.2,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}
LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 5000.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
GEMMA3_ROPES = {
  "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
  "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1000.0,
  "factor": 4.0,
  "truncate": False,
  "original_max_position_embeddings": 32,
}
WINDOW, FULL = "sliding_attention", "full_attention"
CONFIGS = {
  "llama2": SMALL | {"model_type": "llama"},
  "llama3": SMALL | {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 3},
  "llama_linear": SMALL
  | {"model_type": "llama", "tie_word_embeddings": True}
  | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
  "mistral": SMALL | {"model_type": "mistral", "sliding_window": 6, "head_dim": 16},
  "qwen2": SMALL | {"model_type": "qwen2", "tie_word_embeddings": True},
  "qwen3": SMALL
  | {"model_type": "qwen3", "head_dim": 16, "use_sliding_window": True}
  | {"sliding_window": 5, "max_window_layers": 1},
  "gemma2": SMALL
  | GEMMA
  | {"model_type": "gemma2", "num_hidden_layers": 4}
  | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
  "gemma3": SMALL
  | GEMMA
  | {"model_type": "gemma3_text", "num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPES},
  "gpt_oss": SMALL
  | {"model_type": "gpt_oss", "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 3}
  | {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
  | {"swiglu_limit": 0.7, "rope_parameters": YARN},
  "deepseek_v3": SMALL
  | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "first_k_dense_replace": 2}
  | {"kv_lora_rank": 16, "q_lora_rank": 12, "v_head_dim": 10, "rms_norm_eps": 1e-5}
  | {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
  | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}},
  "gemma4": SMALL
  | {"model_type": "gemma4_text", "num_hidden_layers": 7, "intermediate_size": 24}
  | {"layer_types": [WINDOW, WINDOW, FULL, WINDOW, WINDOW, FULL, FULL], "sliding_window": 4}
  | {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}
  | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
  | {"final_logit_softcapping": 4.0},
}
SHARDED = "llama3"  # saved in several files
PROMPT, STEPS = 24, 32  # tokens of the prompt, and decoded after it
