"""What `config.json` says about a model, to and from a `DecoderConfig`."""

from typing import Any

from paged_jax.models.decoder import DecoderConfig, Rope

SLIDING, FULL = "sliding_attention", "full_attention"
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPES = {  # fields of each scaling: their names in `config.json` and ours
  "default": {"rope_theta": "base"},
  "linear": {"rope_theta": "base", "factor": "factor"},
  "llama3": {
    "rope_theta": "base",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
  },
}
GEMMA = {  # released configurations leave these out
  "vocab_size": 262_208,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "tie_word_embeddings": True,
}
FAMILIES = {  # what each one's configurations may leave out
  "llama": {},
  "mistral": {"sliding_window": 4096},
  "qwen2": {"sliding_window": 4096},
  "qwen3": {"sliding_window": 4096, "head_dim": 128},
  "gemma2": GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
  "gemma3_text": GEMMA | {"rope_theta": 1_000_000.0},
}


def read(raw: dict[str, Any]) -> DecoderConfig:
  """The decoder that a `config.json` describes, in its older and newer forms.

  Raises:
    ValueError: The model is not one of ours; the message names the field.
  """
  family = raw.get("model_type")
  if quantised := raw.get("quantization_config"):
    raise ValueError(f"quantised checkpoints are not supported: {quantised.get('quant_method')!r}")
  if family == "gemma3":  # multimodal: its text part
    return read(raw.get("text_config", {}) | {"model_type": "gemma3_text"})
  if family not in FAMILIES:
    raise ValueError(f"model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
  for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
    if raw.get(name):
      raise ValueError(f"{name} is not supported for model_type {family!r}")
  raw = FAMILIES[family] | raw
  gemma = family.startswith("gemma")
  hidden_size, num_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
  activation = raw.get("hidden_activation" if gemma else "hidden_act") or "silu"
  if activation not in ACTIVATIONS:
    raise ValueError(f"activation {activation!r} is not supported, only {', '.join(ACTIVATIONS)}")
  kinds = _layer_kinds(raw, family)
  return DecoderConfig(
    vocab_size=_size(raw, "vocab_size"),
    hidden_size=hidden_size,
    intermediate_size=_size(raw, "intermediate_size"),
    num_layers=len(kinds),
    num_heads=num_heads,
    num_kv_heads=raw.get("num_key_value_heads") or num_heads,
    head_dim=raw.get("head_dim") or hidden_size // num_heads,
    max_length=raw.get("max_position_embeddings") or 2048,
    windows=tuple(raw["sliding_window"] if kind == SLIDING else None for kind in kinds),
    ropes=tuple(_read_rope(raw, family, kind) for kind in kinds),
    activation=ACTIVATIONS[activation],
    norm_eps=raw.get("rms_norm_eps", 1e-6),
    norm_offset=gemma,
    post_norms=gemma,
    qk_norm=family in ("qwen3", "gemma3_text"),
    qkv_bias=family == "qwen2",
    tied=raw.get("tie_word_embeddings", False),
    embed_scale=hidden_size**0.5 if gemma else 1.0,
    attention_scale=raw["query_pre_attn_scalar"] ** -0.5 if gemma else None,
    attention_softcap=raw.get("attn_logit_softcapping"),
    logit_softcap=raw.get("final_logit_softcapping"),
  )


def write(config: DecoderConfig) -> dict[str, Any]:
  """The `config.json` of a Llama; `read` is its inverse.

  Raises:
    ValueError: The model is no Llama.
  """
  rope = config.ropes[0]
  raw = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": {"rope_type": rope.scaling}
    | {theirs: getattr(rope, ours) for theirs, ours in ROPES[rope.scaling].items()},
    "tie_word_embeddings": config.tied,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  if read(raw) != config:
    raise ValueError(f"only models of the llama family can be saved, got {config}")
  return raw


def _size(raw: dict[str, Any], name: str) -> int:
  """A size that the configuration must state."""
  value = raw.get(name)
  if not isinstance(value, int) or value < 1:
    raise ValueError(f"{name} must be a positive integer, got {value!r}")
  return value


def _layer_kinds(raw: dict[str, Any], family: str) -> list[str]:
  """Sliding or full attention of each layer: as listed, or else by the family's rule."""
  layers = range(_size(raw, "num_hidden_layers"))
  windowed = raw.get("sliding_window") and raw.get("use_sliding_window", "qwen" not in family)
  if family == "llama" or not windowed:
    return [FULL for _ in layers]
  if family == "mistral":
    return [SLIDING for _ in layers]
  if kinds := raw.get("layer_types"):
    if len(kinds) != len(layers) or not set(kinds) <= {SLIDING, FULL}:
      raise ValueError(f"layer_types must say {SLIDING!r} or {FULL!r} of each layer, got {kinds}")
    return kinds
  if "qwen" in family:
    return [SLIDING if i >= raw.get("max_window_layers", 28) else FULL for i in layers]
  pattern = 2 if family == "gemma2" else raw.get("sliding_window_pattern", 6)
  return [SLIDING if (i + 1) % pattern else FULL for i in layers]


def _read_rope(raw: dict[str, Any], family: str, kind: str) -> Rope:
  """The rotary embedding of the layers of a kind; Gemma 3 has another one for sliding layers."""
  local = family == "gemma3_text" and kind == SLIDING
  stated = raw.get("rope_parameters") or {}
  stated = stated.get(kind, stated) or ({} if local else raw.get("rope_scaling") or {})
  scaling = stated.get("rope_type") or stated.get("type") or "default"
  if scaling not in ROPES:
    raise ValueError(f"rope scaling {scaling!r} is not supported, only {', '.join(ROPES)}")
  stated = {
    "rope_theta": raw.get("rope_local_base_freq" if local else "rope_theta", 10_000.0),
    "original_max_position_embeddings": raw.get("max_position_embeddings"),
  } | stated
  for name in ROPES[scaling]:
    if stated.get(name) is None:
      raise ValueError(f"rope scaling {scaling!r} needs {name}")
  return Rope(scaling, **{ours: stated[theirs] for theirs, ours in ROPES[scaling].items()})
