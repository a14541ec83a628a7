"""What released files leave out, carry along or get wrong: decided as in transformers, or refused."""

import copy as copying
import json

import hypothesis
import jax.numpy as jnp
import numpy as np
import odd_models
import pytest
import safetensors.numpy
from hypothesis import strategies
from test_odd_models import shapes

from paged_jax import models
from paged_jax.models import families

RAW = odd_models.LLAMA | {"head_dim": 8}
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
DEFAULTS = {  # of each family that states nothing, by transformers 5.24: see the test below
  "llama": (32000, 4096, 11008, 32, 32, 32, 128, 2048, False),
  "mistral": (32000, 4096, 14336, 32, 32, 8, 128, 131072, False),
  "qwen2": (151936, 4096, 22016, 32, 32, 32, 128, 32768, False),
  "qwen3": (151936, 4096, 22016, 32, 32, 32, 128, 32768, False),
  "gemma2": (256000, 2304, 9216, 26, 8, 4, 256, 8192, True),
  "gemma3_text": (262208, 2304, 9216, 26, 8, 4, 256, 131072, True),
  "gemma4_text": (262144, 2304, 9216, 30, 8, 4, 256, 131072, True),
  "gpt_oss": (201088, 2880, 2880, 36, 64, 8, 64, 131072, False),
}


def checkpoint(folder, raw=RAW, **changes):
  """A checkpoint whose tensors are changed by name; one changed to None goes."""
  odd_models.write(folder, raw, shapes(families.read(RAW)))
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file) | {
    k.replace("__", "."): v for k, v in changes.items()
  }
  safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, file)
  return folder


def shard(folder, files, metadata=None, keep=False):
  """Splits the one file into these ({file: names}, None for all others), with an index."""
  whole = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(whole)
  named = {name for names in files.values() for name in names or ()}
  index = {}
  for file, names in files.items():
    part = {k: v for k, v in tensors.items() if (k in names if names else k not in named)}
    safetensors.numpy.save_file(part, folder / file)
    index |= dict.fromkeys(part, file)
  content = {"metadata": metadata or {}, "weight_map": index}
  (folder / "model.safetensors.index.json").write_text(json.dumps(content))
  if not keep:
    whole.unlink()


def sizes(config):
  return (
    config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers,
    config.num_heads, config.num_kv_heads, config.head_dim, config.max_length, config.tied,
  )  # fmt: skip


@pytest.mark.parametrize("family", DEFAULTS)
def test_family_that_states_nothing_has_the_sizes_of_transformers(family):
  assert sizes(families.read({"model_type": family})) == DEFAULTS[family]


def test_deepseek_that_states_nothing_has_the_sizes_of_transformers():
  raw = {"model_type": "deepseek_v3", "first_k_dense_replace": 61}  # no layers of experts
  config = families.read(raw)
  assert sizes(config) == (129280, 7168, 18432, 61, 128, 1, 512 + 64, 4096, False)
  assert config.latent == models.Latent(512, 128, 64, 128, query_rank=1536)
  assert config.attention_scale == 192**-0.5


@pytest.mark.parametrize("family", DEFAULTS)
@pytest.mark.filterwarnings("default")  # of transformers
def test_sizes_are_those_of_transformers_now(family):
  transformers = pytest.importorskip("transformers", reason="the live comparison needs it")
  config = transformers.AutoConfig.for_model(family)
  config.allow_global_per_layer_attribute_access = True  # Gemma 4: these of layers with a window
  head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
  assert DEFAULTS[family] == (
    config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
    config.num_attention_heads, config.num_key_value_heads, head_dim,
    config.max_position_embeddings, config.tie_word_embeddings,
  )  # fmt: skip
  ours = families.read({"model_type": family})
  assert ours.norm_eps == config.rms_norm_eps
  kinds = getattr(config, "layer_types", None)
  if kinds is None:
    kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else ""] * len(
      ours.ropes
    )
  window = config.sliding_window if "sliding_attention" in kinds else None
  assert ours.windows == tuple(window if k == "sliding_attention" else None for k in kinds)
  assert ours.logit_softcap == getattr(config, "final_logit_softcapping", None)


def test_multimodal_gemma3_is_tied_as_the_whole_says_and_has_no_cap():
  text = {"tie_word_embeddings": False, "final_logit_softcapping": 2.0}
  raw = {"model_type": "gemma3", "text_config": text}
  config = families.read(raw)
  assert config.tied and config.logit_softcap is None and config.max_length == 131_072
  assert not families.read(raw | {"tie_word_embeddings": False}).tied
  assert not families.read(raw | {"tie_word_embeddings": None}).tied
  assert families.read({"model_type": "gemma3", "text_config": None}).hidden_size == 2304


def test_gemma4_that_states_nothing_has_other_heads_where_all_tokens_are_seen():
  config = families.read({"model_type": "gemma4_text"})
  assert {shape[:3] for shape in config.shapes} == {(4, 256, 9216), (4, 512, 9216)}
  full, window = config.groups
  assert (full.head_dim, full.layers) == (512, (5, 11, 17, 23, 29))
  assert (window.head_dim, window.window, len(window.layers)) == (256, 512, 25)
  assert config.ropes[5] == models.Rope("proportional", 1e6, part=0.25)
  assert (config.layer_input_size, config.layer_input_vocab_size) == (256, 262_144)


def test_multimodal_gemma4_keeps_its_cap():
  text = {"tie_word_embeddings": False, "final_logit_softcapping": 2.0}
  config = families.read({"model_type": "gemma4", "text_config": text})
  assert config.tied and config.logit_softcap == 2


@pytest.mark.parametrize(
  ("raw", "message"),
  [
    ({"model_type": "gemma4_text", "enable_moe_block": True}, "enable_moe_block is not supported"),
    (
      {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
      "use_bidirectional_attention must be null or 'vision', got 'all'",
    ),
    (
      {"model_type": "gemma4_text", "num_kv_shared_layers": 25},
      "num_kv_shared_layers must be so few that a layer of each kind keeps",
    ),
    (
      {"model_type": "gemma4_text", "rope_parameters": {"sliding_attention": {"rope_theta": 5}}},
      "rope_parameters must be an object with full_attention",
    ),
    (
      {"model_type": "gemma4_text", "per_layer_config": {"5": {"head_dim": 7}}},
      "head_dim must be even, got 7",
    ),
    (
      {"model_type": "gemma4_text", "per_layer_config": {"5": {"rms_norm_eps": 1}}},
      "per_layer_config: rms_norm_eps of layer 5 is not supported",
    ),
    ({"model_type": "gemma2", "sliding_window": None}, "sliding_window must be a positive"),
    ({"model_type": "gemma3_text", "layer_types": []}, "layer_types must say"),
    ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern must be"),
    ({"model_type": "gemma2", "num_key_value_heads": None}, "num_key_value_heads must be"),
    ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads must be"),
    ({"model_type": "gpt_oss", "head_dim": None}, "head_dim must be a positive integer, got None"),
    ({"model_type": "gpt_oss", "num_experts_per_tok": 129}, "per_tok must be at most num_local_experts=128"),
    ({"model_type": "gpt_oss", "swiglu_limit": 0}, "swiglu_limit must be a number above 0, got 0"),
    (
      {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
      "quantised checkpoints are not supported: 'mxfp4'; save the weights as bfloat16 first",
    ),
    (
      {"model_type": "deepseek_v3"},
      "first_k_dense_replace must be at least num_hidden_layers=61, as layers of experts are not "
      "supported, got 3",
    ),
    (
      {"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_key_value_heads": 64},
      "num_key_value_heads must be num_attention_heads=128, got 64",
    ),
    (
      {"model_type": "deepseek_v3", "num_hidden_layers": 2, "qk_rope_head_dim": 7},
      "qk_rope_head_dim must be even, got 7",
    ),
    ({"model_type": "qwen2", "head_dim": None}, "head_dim must be a positive integer, got None"),
    (
      {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32},
      "sliding_window must be a positive integer, got None",
    ),
    (
      {"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
      "rope_parameters must be flat",
    ),
    ({"num_attention_heads": 3}, "num_attention_heads must be a divisor of hidden_size=4096, got 3"),
    ({"hidden_size": True}, "hidden_size must be a positive integer, got True"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, got 1000000000"),
    ({"max_position_embeddings": None}, "max_position_embeddings must be a positive integer"),
    ({"rms_norm_eps": None}, "rms_norm_eps must be a number above 0, got None"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
    ({"hidden_act": None}, "hidden_act must be a string, got None"),
    ({"rope_theta": None}, "rope_theta must be a number above 1, got None"),
    ({"rope_theta": "1e6"}, "rope_theta must be a number above 1, got '1e6'"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
    ({"rope_scaling": {"rope_type": None}}, "rope scaling None is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number above 0, got '2'"),
    ({"rope_scaling": {"type": "longrope", "long_factor": [1]}}, "'longrope' needs short_factor"),
    (
      {"rope_scaling": {"type": "longrope", "long_factor": [1], "short_factor": [1]}},
      r"short_factor must be a list of 64 numbers, one per pair of head_dim, got \[1\]",
    ),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
      "partial_rotary_factor must be 1 with rope scaling 'linear', got 0.5",
    ),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "no"}}, "truncate must be true or"),
    ({"quantization_config": "gptq"}, "quantization_config must be an object, got 'gptq'"),
  ],
)  # fmt: skip
def test_wrong_field_is_named_with_its_value(raw, message):
  with pytest.raises(ValueError, match=message):
    families.read({"model_type": "llama"} | raw)


@pytest.mark.parametrize(
  ("stated", "stored", "dtype"),
  [
    ({}, "float16", "float16"),
    ({"torch_dtype": None}, "bfloat16", "bfloat16"),
    ({"torch_dtype": "auto"}, "bfloat16", "bfloat16"),
    ({"torch_dtype": "bfloat16"}, "float32", "bfloat16"),
    ({"torch_dtype": "torch.bfloat16"}, "float32", "bfloat16"),
    ({"dtype": "float", "torch_dtype": "bfloat16"}, "bfloat16", "float32"),
    ({"dtype": None, "torch_dtype": "half"}, "float32", "float16"),
  ],
)
def test_dtype_is_as_stated_or_else_as_stored(stated, stored, dtype, tmp_path):
  checkpoint(tmp_path, RAW | stated)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  tensors = {name: np.asarray(jnp.asarray(value, stored)) for name, value in tensors.items()}
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  assert models.load(tmp_path).norm.weight.dtype == dtype


@pytest.mark.parametrize("stated", ["int8", "float64", "nonsense", 5, ["bfloat16"], True, {}])
def test_dtype_that_weights_cannot_have_is_named(stated, tmp_path):
  checkpoint(tmp_path, RAW | {"torch_dtype": stated})
  message = r"config\.json: torch_dtype must be float32, bfloat16 or float16, got "
  with pytest.raises(ValueError, match=message):
    models.load(tmp_path)
  with pytest.raises(ValueError, match=r"^dtype must be float32, bfloat16 or float16, got"):
    models.load(checkpoint(tmp_path), stated)


def test_weight_too_large_for_the_dtype_is_named(tmp_path):
  norm = np.ones(32, np.float32)
  norm[3] = -1e5
  checkpoint(tmp_path, **{NORM: norm})
  assert models.load(tmp_path, "bfloat16").norm.weight[3] == jnp.bfloat16(-1e5)
  with pytest.raises(ValueError, match=r"'model\.norm\.weight' has -100000, too large for float16"):
    models.load(tmp_path, "float16")


def test_weight_that_is_infinite_already_loads(tmp_path):
  norm = np.full(32, np.inf, np.float32)
  assert np.isinf(models.load(checkpoint(tmp_path, **{NORM: norm}), "float16").norm.weight).all()


def test_whole_file_wins_over_a_stale_index(tmp_path):
  checkpoint(tmp_path)
  shard(tmp_path, {"a.safetensors": None}, keep=True)
  (tmp_path / "a.safetensors").unlink()
  assert models.load(tmp_path).norm.weight.shape == (32,)


def test_index_says_the_dtype_where_the_configuration_does_not(tmp_path):
  shard(checkpoint(tmp_path), {"a.safetensors": None}, {"dtype": "bfloat16"})
  assert models.load(tmp_path).norm.weight.dtype == jnp.bfloat16


def test_later_shard_wins(tmp_path):
  shard(checkpoint(tmp_path), {"a.safetensors": None, "b.safetensors": [HEAD]})
  tensors = safetensors.numpy.load_file(tmp_path / "b.safetensors")
  tensors[NORM] = np.full(32, 7, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / "b.safetensors")
  assert (models.load(tmp_path).norm.weight[...] == 7).all()


@pytest.mark.parametrize(
  ("content", "message"),
  [({"x": 5}, "weight_map of 'x' must be a file name, got 5"), (None, "has no weight_map")],
)
def test_damaged_index_is_named(content, message, tmp_path):
  shard(checkpoint(tmp_path), {"a.safetensors": None})
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": content}))
  with pytest.raises(ValueError, match=rf"index\.json.*{message}"):
    models.load(tmp_path)


def test_weights_in_pytorch_files_alone_are_to_be_converted(tmp_path):
  (checkpoint(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match=r"convert pytorch_model\.bin to safetensors"):
    models.load(tmp_path)


def test_head_that_differs_from_the_embedding_is_not_tied(tmp_path):
  tied = RAW | {"tie_word_embeddings": True}
  decoder = models.load(checkpoint(tmp_path, tied))
  assert not decoder.config.tied and decoder.lm_head is not None
  stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  np.testing.assert_array_equal(decoder.lm_head.weight[...], stored[HEAD])
  decoder = models.load(checkpoint(tmp_path, tied, **{EMBEDDING: stored[HEAD]}))
  assert decoder.config.tied and decoder.lm_head is None


def test_head_of_a_tied_model_may_be_stored_instead_of_the_embedding(tmp_path):
  decoder = models.load(
    checkpoint(tmp_path, RAW | {"tie_word_embeddings": True}, **{EMBEDDING: None})
  )
  stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  np.testing.assert_array_equal(decoder.embed_tokens.weight[...], stored[HEAD])


def test_model_that_is_not_tied_needs_a_head(tmp_path):
  with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is 'lm_head\.weight'"):
    models.load(checkpoint(tmp_path, **{HEAD: None}))


NESTED = {"text_config": {"eos_token_id": 5}}
EOS = {  # config.json, generation_config.json, tokens
  "nothing": ({}, None, ()),
  "config": ({"eos_token_id": 2}, None, (2,)),
  "list": ({"eos_token_id": [2, 3]}, None, (2, 3)),
  "null": ({"eos_token_id": None}, None, ()),
  "beyond the vocabulary": ({"eos_token_id": 999}, None, (999,)),
  "nested": (NESTED, None, (5,)),
  "nested and above": (NESTED | {"eos_token_id": 2}, None, (2,)),
  "nested and null above": (NESTED | {"eos_token_id": None}, None, (5,)),
  "generation first": ({"eos_token_id": 2}, {"eos_token_id": [4, 5]}, (4, 5)),
  "generation without": ({"eos_token_id": 2}, {"do_sample": True}, ()),
  "generation with null": ({"eos_token_id": 2}, {"eos_token_id": None}, ()),
  "generation without, nested": (NESTED, {}, ()),
}


def write_eos(folder, config, generation):
  (folder / "config.json").write_text(json.dumps(config))
  if generation is not None:
    (folder / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize("name", EOS)
def test_eos_tokens_come_from_where_transformers_takes_them(name, tmp_path):
  config, generation, tokens = EOS[name]
  write_eos(tmp_path, config, generation)
  assert models.eos_tokens(tmp_path) == tokens


@pytest.mark.parametrize("name", EOS)
@pytest.mark.filterwarnings("default")  # of torch and transformers
def test_eos_tokens_are_those_that_transformers_stops_at(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="the live comparison needs it")
  config, generation, tokens = EOS[name]
  write_eos(tmp_path, config, generation)
  kind = transformers.GenerationConfig
  if generation is None:  # as `from_pretrained` of a model goes on
    file = {"config_file_name": "config.json", "_from_model_config": True}
    found = kind.from_pretrained(tmp_path, **file).eos_token_id
  else:
    found = kind.from_pretrained(tmp_path).eos_token_id
  found = () if found is None else (found,) if isinstance(found, int) else tuple(found)
  assert found == tokens


@pytest.mark.parametrize("ids", [2.0, "2", [2, None], True, -1, [[2]], {"a": 1}, 2**40])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_eos_token_that_is_none_is_named(file, ids, tmp_path):
  write_eos(tmp_path, {}, None)
  (tmp_path / file).write_text(json.dumps({"eos_token_id": ids}))
  with pytest.raises(
    ValueError, match=rf"{file}: eos_token_id must be a token or a list of tokens"
  ):
    models.eos_tokens(tmp_path)


def test_folder_without_configuration_is_no_checkpoint(tmp_path):
  for call in (models.load, models.eos_tokens):
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint: it has no config\.json"):
      call(tmp_path)


ROPE = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": True}
ROPE |= {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 16, "type": "yarn"}
ROPE |= {"attention_factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
WHOLE = RAW | {"rope_scaling": ROPE, "rope_theta": 1e4, "max_position_embeddings": 64}
WHOLE |= {"tie_word_embeddings": True, "torch_dtype": "float32", "rms_norm_eps": 1e-5}
WHOLE |= {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
WHOLE |= {"layer_types": ["full_attention"] * 2, "sliding_window_pattern": 2, "eos_token_id": 2}
WHOLE |= {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "hidden_act": "silu"}
WHOLE |= {"final_logit_softcapping": 2.0, "hidden_activation": "gelu_pytorch_tanh"}
WHOLE |= {"rope_parameters": None, "rope_local_base_freq": 1e3, "partial_rotary_factor": 1.0}
WHOLE |= {"quantization_config": None, "attention_bias": False, "text_config": {}, "dtype": None}
WHOLE |= {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_alpha": 1, "swiglu_limit": 7}
WHOLE |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
WHOLE |= {"v_head_dim": 8, "first_k_dense_replace": 2, "rope_interleave": True}
WHOLE |= {"global_head_dim": 8, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0}
WHOLE |= {"use_double_wide_mlp": False, "attention_k_eq_v": True, "enable_moe_block": False}
WHOLE |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 8}
VALUES = strategies.one_of(
  strategies.none(),
  strategies.booleans(),
  strategies.integers(),
  strategies.sampled_from([0, -1, 1, 2, 3, 2**31, 10**400, 0.5, 1e300, 1e-300]),
  strategies.floats(),
  strategies.text(max_size=5),
  strategies.sampled_from(["\n", "linear", "dynamic", "longrope", "llama3", "full_attention"]),
  strategies.lists(strategies.none() | strategies.integers(), max_size=3),
  strategies.dictionaries(strategies.text(max_size=3), strategies.none(), max_size=2),
)


@hypothesis.given(
  family=strategies.sampled_from([*families.FAMILIES, "gemma3", "gemma4"]),
  scaling=strategies.sampled_from(["yarn", "linear", "dynamic", "longrope", "llama3"]),
  name=strategies.sampled_from(sorted(WHOLE) + [("rope_scaling", name) for name in sorted(ROPE)]),
  value=VALUES,
)
@hypothesis.settings(max_examples=500, deadline=None)
def test_one_wrong_field_ends_in_one_line_that_names_it(
  family, scaling, name, value, tmp_path_factory
):
  folder = tmp_path_factory.getbasetemp() / "fuzz"
  folder.mkdir(exist_ok=True)
  raw = copying.deepcopy(WHOLE) | {"model_type": family}
  raw["rope_scaling"]["rope_type"] = scaling
  if family == "deepseek_v3":
    raw["num_key_value_heads"] = raw["num_attention_heads"]
  place = raw["rope_scaling"] if isinstance(name, tuple) else raw
  name = name[1] if isinstance(name, tuple) else name
  place[name] = value
  if family in ("gemma3", "gemma4"):
    raw = {"model_type": family, "text_config": raw, "eos_token_id": raw["eos_token_id"]}
  try:
    content = json.dumps(raw)
  except ValueError:
    hypothesis.reject()
  (folder / "config.json").write_text(content)
  for call in (models.load, models.eos_tokens):
    try:
      call(folder)
    except FileNotFoundError as error:  # the configuration is right, and there are no tensors
      assert str(error).endswith("model.safetensors does not exist")
    except ValueError as error:
      message = str(error)
      assert message.startswith(f"{folder / 'config.json'}: ") and "\n" not in message
      assert name in message or name in ("rope_type", "type", "model_type"), message
