"""What `config.json` says about a model, to and from a `DecoderConfig`.

`transformers` decides what a field means, and which value a missing or null field has.
"""

from typing import Any

from paged_jax.models import fields, ropes
from paged_jax.models.config import DecoderConfig, Experts, Latent, Shape
from paged_jax.models.ropes import Rope

SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_KINDS = {SLIDING: SLIDING, FULL: FULL, "attention": FULL}  # the last is an older name
ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu_pytorch_tanh": "gelu_tanh",
}
COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
LARGE = COMMON | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
QWEN = LARGE | {
  "vocab_size": 151_936,
  "intermediate_size": 22_016,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32_768,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
GEMMA = COMMON | {
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "tie_word_embeddings": True,
}
GPT_OSS_ROPE = {  # if nothing is stated
  "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
  "original_max_position_embeddings": 4096,
}  # fmt: skip
FAMILIES = {  # values of fields that a configuration leaves out
  "llama": LARGE
  | {"vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048},
  "mistral": LARGE
  | {"vocab_size": 32_000, "intermediate_size": 14_336, "max_position_embeddings": 131_072}
  | {"num_key_value_heads": 8, "sliding_window": 4096},
  "qwen2": QWEN,
  "qwen3": QWEN | {"head_dim": 128},
  "gemma2": GEMMA
  | {"vocab_size": 256_000, "max_position_embeddings": 8192}
  | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
  "gemma3_text": GEMMA | {"vocab_size": 262_208, "max_position_embeddings": 131_072},
  "gemma4_text": GEMMA
  | {"vocab_size": 262_144, "num_hidden_layers": 30, "max_position_embeddings": 131_072}
  | {"sliding_window": 512, "global_head_dim": 512, "num_kv_shared_layers": 0}
  | {"use_double_wide_mlp": False, "attention_k_eq_v": False}
  | {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144},
  "gpt_oss": COMMON
  | {"vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "rms_norm_eps": 1e-5}
  | {"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
  | {"sliding_window": 128, "max_position_embeddings": 131_072, "num_local_experts": 128}
  | {"num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True},
  "deepseek_v3": COMMON
  | {"vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432}
  | {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128}
  | {"max_position_embeddings": 4096, "kv_lora_rank": 512, "q_lora_rank": 1536}
  | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
  | {"first_k_dense_replace": 3, "rope_interleave": True},
}
NULL_HEADS = ("llama", "qwen2", "qwen3", "deepseek_v3")  # null KV heads: as many as query heads
NULL_HEAD_DIM = ("llama", "mistral")  # null head_dim: as where it is missing
WHOLE_HEADS = ("llama", "gemma2", "gemma3_text")  # heads must divide the hidden size in any case
UNSUPPORTED = {  # fields that would change the model; other families do not have them
  "llama": ("attention_bias", "mlp_bias"),
  "mistral": (),
  "qwen2": (),
  "qwen3": ("attention_bias",),
  "gemma2": ("attention_bias", "use_bidirectional_attention"),
  "gemma3_text": ("attention_bias", "use_bidirectional_attention"),
  "gemma4_text": ("attention_bias", "enable_moe_block"),
  "gpt_oss": (),
  "deepseek_v3": ("attention_bias",),
}
GEMMA4_ROPES = {  # if nothing is stated
  SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
  FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
MAX_LAYERS = 10_000


def read(raw: dict[str, Any]) -> DecoderConfig:
  """The decoder that a `config.json` describes, in its older and newer forms.

  A missing or null field has the value that `transformers` gives it. Of a multimodal Gemma only the
  text part is read: it is tied if the whole model is. The logits of a multimodal Gemma 3 have no
  cap, because that class ignores the cap. With a `dynamic` or `longrope` scaling `max_length` is the length up
  to which nothing is scaled.

  Raises:
    ValueError: The model is not one of ours, or a field is wrong; the message names the field.
  """
  _check_not_quantised(raw)
  if raw.get("model_type") in ("gemma3", "gemma4"):
    return read(_text_part(raw))
  family = _family(raw)
  raw = _completed(raw, family)
  gemma = family.startswith("gemma")
  latent = _latent(raw) if family == "deepseek_v3" else None
  num_heads, num_kv_heads, head_dim = _heads(raw, family, latent)
  kinds = _layer_kinds(raw, family)
  gemma4 = family == "gemma4_text"
  shapes = _shapes(raw, kinds) if gemma4 else ()
  dims = [x.head_dim for x in shapes] or [latent.rope_dim if latent else head_dim] * len(kinds)
  by_kind = {each: _read_rope(raw, family, *each) for each in dict.fromkeys(zip(kinds, dims))}
  limits = [rope.max_length for rope in by_kind.values() if rope.max_length]
  window = raw["sliding_window"] if SLIDING in kinds else None
  biased = family == "gpt_oss" and fields.flag(raw, "attention_bias")
  return DecoderConfig(
    vocab_size=fields.whole(raw, "vocab_size"),
    hidden_size=fields.whole(raw, "hidden_size"),
    intermediate_size=fields.whole(raw, "intermediate_size"),
    num_layers=len(kinds),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    max_length=min(fields.whole(raw, "max_position_embeddings"), *limits, fields.LARGEST),
    windows=tuple(window if kind == SLIDING else None for kind in kinds),
    ropes=tuple(by_kind[each] for each in zip(kinds, dims)),
    shapes=shapes,
    activation=_activation(raw, "hidden_activation" if gemma else "hidden_act"),
    norm_eps=fields.number(raw, "rms_norm_eps"),
    norm_offset=gemma and not gemma4,
    norm_wide=gemma or family == "gpt_oss",
    post_norms=gemma,
    qk_norm=family in ("qwen3", "gemma3_text", "gemma4_text"),
    value_norm=gemma4,
    layer_scalars=gemma4,
    layer_input_size=fields.whole(raw, "hidden_size_per_layer_input", low=0) if gemma4 else 0,
    layer_input_vocab_size=fields.whole(raw, "vocab_size_per_layer_input") if gemma4 else 0,
    qkv_bias=family == "qwen2" or biased,
    output_bias=biased,
    sinks=family == "gpt_oss",
    experts=_experts(raw) if family == "gpt_oss" else None,
    tied=fields.flag(raw, "tie_word_embeddings"),
    embed_scale=fields.whole(raw, "hidden_size") ** 0.5 if gemma else 1.0,
    latent=latent,
    attention_scale=_attention_scale(raw, latent, by_kind[kinds[0], dims[0]]),
    # Gemma 3 has the field, but its attention ignores it
    attention_softcap=_cap(raw, "attn_logit_softcapping") if family == "gemma2" else None,
    logit_softcap=_cap(raw, "final_logit_softcapping") if gemma else None,
  )


def write(config: DecoderConfig) -> dict[str, Any]:
  """The `config.json` of a Llama; `read` is its inverse.

  Raises:
    ValueError: The model is no Llama.
  """
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
    "rope_parameters": ropes.write(config.ropes[0]),
    "tie_word_embeddings": config.tied,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  if read(raw) != config:
    raise ValueError(f"only models of the llama family can be saved, got {config}")
  return raw


def _family(raw: dict[str, Any]) -> str:
  """The family of a model, if we support all of it."""
  family = raw.get("model_type")
  if not isinstance(family, str) or family not in FAMILIES:
    raise ValueError(f"model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
  for name in UNSUPPORTED[family]:
    if raw.get(name):
      raise ValueError(f"{name} is not supported for model_type {family!r}, got {raw[name]!r}")
  return family


def _check_not_quantised(raw: dict[str, Any]) -> None:
  if quantised := fields.mapping(raw, "quantization_config"):
    method = quantised.get("quant_method")
    raise ValueError(
      f"quantization_config: quantised checkpoints are not supported: {method!r}; save the weights"
      " as bfloat16 first"
    )


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
  """The configuration of the language model in a multimodal Gemma."""
  tied = raw.get("tie_word_embeddings", True)
  text = fields.mapping(raw, "text_config") | {
    "model_type": f"{raw['model_type']}_text",
    "tie_word_embeddings": False if tied is None else tied,
  }
  return text | {"final_logit_softcapping": None} if raw["model_type"] == "gemma3" else text


def _completed(raw: dict[str, Any], family: str) -> dict[str, Any]:
  """The configuration with the family's values for missing fields."""
  completed = FAMILIES[family] | raw
  num_heads = fields.whole(completed, "num_attention_heads")
  num_kv_heads = FAMILIES[family].get("num_key_value_heads", 1)
  if "num_key_value_heads" not in raw and num_heads % num_kv_heads:  # no such model can run
    completed["num_key_value_heads"] = num_heads
  return completed


def _shapes(raw: dict[str, Any], kinds: list[str]) -> tuple[Shape, ...]:
  """The sizes of the layers of a Gemma 4.

  Those that see all tokens have other heads, as `per_layer_config` says or two older fields. The
  last layers read the keys and values of layers before them.
  """
  if (bidirectional := raw.get("use_bidirectional_attention")) not in (None, "vision"):
    raise fields.wrong("use_bidirectional_attention", "null or 'vision'", bidirectional)
  same = fields.flag(raw, "attention_k_eq_v")
  other = same and raw.get("num_global_key_value_heads") is not None
  heads = {
    SLIDING: _kv_heads(raw),
    FULL: _kv_heads(
      raw, "num_global_key_value_heads" if other else "num_key_value_heads", "global_head_dim"
    ),
  }
  num_own = len(kinds) - fields.whole(raw, "num_kv_shared_layers", low=0)
  if num_own < 1 or {*kinds[:num_own]} != {*kinds}:
    wanted = "so few that a layer of each kind keeps its own keys and values"
    raise fields.wrong("num_kv_shared_layers", wanted, raw["num_kv_shared_layers"])
  wide = 2 if fields.flag(raw, "use_double_wide_mlp") else 1
  shapes = []
  for i, kind in enumerate(kinds):
    own, sizes = i < num_own, _stated_of_layer(raw, i)
    num_kv_heads, head_dim = _kv_heads(sizes) if "per_layer_config" in raw else heads[kind]
    width = fields.whole(sizes, "intermediate_size") * (1 if own else wide)
    values = not (own and same and kind == FULL)
    shapes.append(Shape(num_kv_heads, head_dim, width, own, values))
  return tuple(shapes)


def _stated_of_layer(raw: dict[str, Any], layer: int) -> dict[str, Any]:
  """The configuration with what `per_layer_config` says about a layer."""
  stated = fields.mapping(fields.mapping(raw, "per_layer_config"), str(layer))
  if unknown := {*stated} - {"head_dim", "num_key_value_heads", "intermediate_size"}:
    raise ValueError(f"per_layer_config: {min(unknown)} of layer {layer} is not supported")
  return raw | stated


def _kv_heads(
  raw: dict[str, Any], number: str = "num_key_value_heads", size: str = "head_dim"
) -> tuple[int, int]:
  """KV heads and head dim, from the fields of these names."""
  num_heads, num_kv_heads = fields.whole(raw, "num_attention_heads"), fields.whole(raw, number)
  if num_heads % num_kv_heads:
    raise fields.wrong(number, f"a divisor of num_attention_heads={num_heads}", num_kv_heads)
  head_dim = fields.whole(raw, size)
  if head_dim % 2:
    raise fields.wrong(size, "even", head_dim)
  return num_kv_heads, head_dim


def _latent(raw: dict[str, Any]) -> Latent:
  """The latent attention of a DeepSeek V3, all of whose layers must be dense."""
  num_layers = fields.whole(raw, "num_hidden_layers")
  if fields.whole(raw, "first_k_dense_replace", low=0) < num_layers:
    wanted = f"at least num_hidden_layers={num_layers}, as layers of experts are not supported"
    raise fields.wrong("first_k_dense_replace", wanted, raw["first_k_dense_replace"])
  rope_dim = fields.whole(raw, "qk_rope_head_dim")
  if rope_dim % 2:
    raise fields.wrong("qk_rope_head_dim", "even", rope_dim)
  return Latent(
    rank=fields.whole(raw, "kv_lora_rank"),
    key_dim=fields.whole(raw, "qk_nope_head_dim"),
    rope_dim=rope_dim,
    value_dim=fields.whole(raw, "v_head_dim"),
    query_rank=None if raw["q_lora_rank"] is None else fields.whole(raw, "q_lora_rank"),
    interleaved=raw["rope_interleave"] is not None and fields.flag(raw, "rope_interleave"),
  )


def _attention_scale(raw: dict[str, Any], latent: Latent | None, rope: Rope) -> float | None:
  """Factor of the logits, None for that of the head dim."""
  if raw["model_type"] == "gemma4_text":
    return 1.0
  if latent is None:
    gemma = raw["model_type"].startswith("gemma")
    return fields.number(raw, "query_pre_attn_scalar") ** -0.5 if gemma else None
  scale = (latent.key_dim + latent.rope_dim) ** -0.5
  every = _stated_once(raw).get("mscale_all_dim")
  if rope.scaling == "default" or not every:
    return scale
  return (
    scale
    * ropes.mscale(rope.factor, fields.number({"mscale_all_dim": every}, "mscale_all_dim")) ** 2
  )


def _heads(raw: dict[str, Any], family: str, latent: Latent | None) -> tuple[int, int, int]:
  """Query heads, KV heads and head dim; of what is cached, if that is a latent vector."""
  hidden_size = fields.whole(raw, "hidden_size")
  num_heads = fields.whole(raw, "num_attention_heads")
  if raw.get("num_key_value_heads") is None and family in NULL_HEADS:
    raw = raw | {"num_key_value_heads": num_heads}
  if family in WHOLE_HEADS and hidden_size % num_heads:
    raise fields.wrong("num_attention_heads", f"a divisor of {hidden_size=}", num_heads)
  if latent:
    num_kv_heads = fields.whole(raw, "num_key_value_heads")
    if num_kv_heads != num_heads:
      raise fields.wrong("num_key_value_heads", f"num_attention_heads={num_heads}", num_kv_heads)
    return num_heads, 1, latent.rank + latent.rope_dim
  if "head_dim" not in raw or (raw["head_dim"] is None and family in NULL_HEAD_DIM):
    raw = raw | {"head_dim": hidden_size // num_heads}
  return num_heads, *_kv_heads(raw)


def _experts(raw: dict[str, Any]) -> Experts:
  """The experts of a gpt-oss."""
  num_experts = fields.whole(raw, "num_local_experts")
  per_token = fields.whole(raw, "num_experts_per_tok")
  if per_token > num_experts:
    raise fields.wrong("num_experts_per_tok", f"at most num_local_experts={num_experts}", per_token)
  return Experts(
    num_experts,
    per_token,
    gain=fields.number(raw, "swiglu_alpha"),
    limit=fields.number(raw, "swiglu_limit"),
  )


def _activation(raw: dict[str, Any], name: str) -> str:
  """Our name of the activation that a field states."""
  activation = fields.text(raw, name)
  if activation not in ACTIVATIONS:
    known = ", ".join(ACTIVATIONS)
    raise ValueError(f"{name}: activation {activation!r} is not supported, only {known}")
  return ACTIVATIONS[activation]


def _cap(raw: dict[str, Any], name: str) -> float | None:
  return None if raw.get(name) is None else fields.number(raw, name)


def _layer_kinds(raw: dict[str, Any], family: str) -> list[str]:
  """Sliding or full attention of each layer: as listed, or else by the family's rule."""
  layers = range(fields.whole(raw, "num_hidden_layers", high=MAX_LAYERS))
  match family:
    case "llama" | "deepseek_v3":
      return [FULL for _ in layers]
    case "mistral":  # llama and mistral ignore layer_types
      return [_sliding(raw) if raw["sliding_window"] is not None else FULL for _ in layers]
    case "qwen2" | "qwen3":
      if not fields.flag(raw, "use_sliding_window"):
        raw = raw | {"sliding_window": None}
      first = fields.whole(raw, "max_window_layers", low=-fields.LARGEST)
      first = len(layers) if raw["sliding_window"] is None else first
      kinds = [SLIDING if i >= first else FULL for i in layers]
    case "gemma2" | "gpt_oss":
      kinds = [FULL if i % 2 else SLIDING for i in layers]
    case "gemma4_text":
      kinds = [SLIDING if (i + 1) % 6 else FULL for i in layers]
    case _:
      pattern = fields.whole({"sliding_window_pattern": 6} | raw, "sliding_window_pattern")
      kinds = [SLIDING if (i + 1) % pattern else FULL for i in layers]
  kinds = kinds if raw.get("layer_types") is None else _listed_kinds(raw, len(layers))
  if family == "gemma4_text":
    kinds[-1] = FULL
  if SLIDING in kinds or family.startswith("gemma"):
    _sliding(raw)
  return kinds


def _listed_kinds(raw: dict[str, Any], num_layers: int) -> list[str]:
  """The kinds of layers that `layer_types` lists."""
  kinds = raw["layer_types"]
  known = isinstance(kinds, list) and all(isinstance(k, str) and k in LAYER_KINDS for k in kinds)
  if not known or len(kinds) != num_layers:
    wanted = f"{SLIDING!r} or {FULL!r} of each of num_hidden_layers={num_layers}"
    raise ValueError(f"layer_types must say {wanted}, got {kinds!r}")
  return [LAYER_KINDS[kind] for kind in kinds]


def _sliding(raw: dict[str, Any]) -> str:
  """The kind of a layer with a window, which must be stated."""
  fields.whole(raw, "sliding_window")
  return SLIDING


def _read_rope(raw: dict[str, Any], family: str, kind: str, head_dim: int) -> Rope:
  """The rotary embedding of the layers of a kind; Gemma 3 has another one for sliding layers."""
  match family:
    case "gemma3_text":
      stated = _stated_per_kind(raw, kind)
    case "gemma4_text":
      stated = _stated_in(raw, kind)
    case _:
      stated = _stated_once(raw)
  return ropes.read(stated, fields.whole(raw, "max_position_embeddings"), head_dim)


def _stated_once(raw: dict[str, Any]) -> dict[str, Any]:
  """The rope of all layers as stated; `rope_scaling`, the older name, wins."""
  new, old = fields.mapping(raw, "rope_parameters"), fields.mapping(raw, "rope_scaling")
  theta = 10_000.0
  if raw["model_type"] == "gpt_oss":
    theta, new = 150_000.0, GPT_OSS_ROPE if raw.get("rope_parameters") is None else new
  stated = {"rope_theta": theta} | _top_level(raw, "rope_theta", "partial_rotary_factor")
  stated |= old or new
  nested = [name for name in (FULL, SLIDING) if name in stated]
  if nested and raw["model_type"] in ("qwen2", "qwen3", "gemma2"):  # Llama and Mistral ignore it
    raise fields.wrong("rope_parameters", "flat, not per kind of layer", stated)
  return stated | _top_level(raw, "original_max_position_embeddings")


def _stated_per_kind(raw: dict[str, Any], kind: str) -> dict[str, Any]:
  """The rope of one kind of layers as stated: nested, or in older fields.

  As in `transformers`, flat `rope_parameters` are ignored (except yarn's `truncate`), and an older
  `rope_scaling` counts only under the name `rope_type`, not `type`.
  """
  nested = fields.mapping(raw, "rope_parameters")
  stated = fields.mapping(nested, kind) or {"rope_type": "default"}
  if kind == FULL:
    stated |= fields.mapping(raw, "rope_scaling")
    theta = {"rope_theta": raw.get("rope_theta", 1_000_000.0)}
  else:
    theta = {"rope_theta": raw.get("rope_local_base_freq", 10_000.0)}
  stated = theta | _top_level(raw, "partial_rotary_factor") | stated
  return stated | {"truncate": nested.get("truncate", True)}


def _stated_in(raw: dict[str, Any], kind: str) -> dict[str, Any]:
  """The rope of one kind of layers as a Gemma 4 states it, nested in `rope_parameters`."""
  nested = raw.get("rope_parameters")
  nested = GEMMA4_ROPES if nested is None else fields.mapping(raw, "rope_parameters")
  if not (stated := fields.mapping(nested, kind)):
    raise fields.wrong("rope_parameters", f"an object with {kind}", nested)
  return stated | {"truncate": nested.get("truncate", True)}


def _top_level(raw: dict[str, Any], *names: str) -> dict[str, Any]:
  """The fields of these names that exist."""
  return {name: raw[name] for name in names if name in raw}
