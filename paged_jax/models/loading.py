"""Hugging Face checkpoints: `config.json` and `*.safetensors`, to and from a `Decoder`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import nnx

from paged_jax.config import CacheConfig
from paged_jax.models import families
from paged_jax.models.decoder import Decoder, DecoderConfig, abstract

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def load(path: str | os.PathLike, dtype: Any = None) -> Decoder:
  """The decoder saved in the folder `path`, read tensor by tensor.

  Args:
    path: A folder with `config.json` and either `model.safetensors` or shards and their index.
    dtype: Of the weights; None = as `config.json` says.

  Raises:
    FileNotFoundError: A file is missing; the message names it.
    ValueError: A file is damaged or the model is not one of ours; the message says how.
  """
  path = Path(path)
  raw = _read_json(path / "config.json")
  config = families.read(raw)
  dtype = jnp.dtype(dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32")
  graph, state = nnx.split(abstract(config))
  leaves = dict(nnx.to_flat_state(state))
  arrays = {name: np.empty(leaf.shape, dtype) for name, leaf in leaves.items()}
  _fill(_parts(arrays, config.num_layers), path, config)
  for name, leaf in leaves.items():  # one at a time: never a second copy of all weights
    leaves[name] = leaf.replace(jnp.asarray(arrays.pop(name)))
  return nnx.merge(graph, nnx.from_flat_state(list(leaves.items())))


def save(decoder: Decoder, path: str | os.PathLike) -> None:
  """Writes `config.json` and `model.safetensors` of a Llama into the folder `path`."""
  path = Path(path)
  path.mkdir(parents=True, exist_ok=True)
  leaves = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
  arrays = {name: np.asarray(leaf[...]) for name, leaf in leaves}
  dtype = next(iter(arrays.values())).dtype.name
  raw = families.write(decoder.config) | {"dtype": dtype}
  (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
  parts = _parts(arrays, decoder.config.num_layers)
  safetensors.numpy.save_file(parts, path / "model.safetensors", {"format": "pt"})


def tokenizer(path: str | os.PathLike) -> tokenizers.Tokenizer | None:
  """The tokenizer of the folder `path`, or None where there is none."""
  file = Path(path) / "tokenizer.json"
  if not file.exists():
    return None
  try:
    return tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(f"{file} is not a tokenizer: {error}") from None


def eos_tokens(path: str | os.PathLike) -> tuple[int, ...]:
  """Ids that end a text, from `generation_config.json` or else `config.json`."""
  for file in (Path(path) / "generation_config.json", Path(path) / "config.json"):
    ids = _read_json(file).get("eos_token_id") if file.exists() else None
    if ids is not None:
      return (ids,) if isinstance(ids, int) else tuple(ids)
  return ()


def cache_config(
  config: DecoderConfig, *, num_pages: int, num_rows: int, page_size: int = 16,
  max_length: int | None = None, dtype: Any = jnp.bfloat16,
) -> CacheConfig:  # fmt: skip
  """A cache for this model; its rows hold `max_length` tokens, by default all it was made for."""
  return CacheConfig(
    num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
    page_size=page_size, num_pages=num_pages, num_rows=num_rows,
    max_length=max_length or config.max_length, dtype=jnp.dtype(dtype),
  )  # fmt: skip


def _read_json(file: Path) -> dict[str, Any]:
  """The object in a JSON file."""
  try:
    raw = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not valid JSON: {error}") from None
  if not isinstance(raw, dict):
    raise ValueError(f"{file} must hold a JSON object, got {type(raw).__name__}")
  return raw


def _parts(arrays: Mapping[Any, np.ndarray], num_layers: int) -> dict[str, np.ndarray]:
  """Views of the stacked `arrays` (by path), one per tensor of a checkpoint, by its name."""
  parts = {}
  for path, array in arrays.items():
    name = ".".join(path[1:])
    match path[0]:
      case "layers":
        parts |= {f"model.layers.{i}.{name}": array[i] for i in range(num_layers)}
      case "lm_head":
        parts[f"lm_head.{name}"] = array
      case module:
        parts[f"model.{module}.{name}"] = array
  return parts


def _fill(parts: dict[str, np.ndarray], path: Path, config: DecoderConfig) -> None:
  """Reads every tensor in the folder `path` into its part, one at a time."""
  missing = set(parts)
  for file in _tensor_files(path):
    try:
      with safetensors.safe_open(file, framework="np") as tensors:
        for stored in tensors.keys():  # noqa: SIM118 (not a mapping)
          name = _text_name(stored)
          if name in missing:
            parts[name][...] = _read_tensor(tensors, stored, parts[name].shape)
            missing.remove(name)
          elif not _ignored(name, config):
            raise ValueError(f"{file} has an unexpected tensor {stored!r}")
    except safetensors.SafetensorError as error:
      raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
  if missing:
    raise ValueError(f"{path} lacks {len(missing)} tensors, the first is {min(missing)!r}")


def _read_tensor(tensors: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of an open safetensors file, if it is what we expect."""
  header = tensors.get_slice(name)
  if header.get_dtype() not in DTYPES:
    raise ValueError(f"dtype of {name!r} must be {' or '.join(DTYPES)}, got {header.get_dtype()}")
  if tuple(header.get_shape()) != shape:
    raise ValueError(f"shape of {name!r} must be {shape}, got {tuple(header.get_shape())}")
  return tensors.get_tensor(name)


def _tensor_files(path: Path) -> list[Path]:
  """The shards that an index lists, or else the one file of tensors."""
  index = path / "model.safetensors.index.json"
  files = [path / "model.safetensors"]
  if index.exists():
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict):
      raise ValueError(f"{index} has no weight_map")
    files = [path / name for name in sorted(set(shards.values()))]
  for file in files:
    if not file.exists():
      raise FileNotFoundError(f"{file} does not exist")
  return files


def _text_name(name: str) -> str:
  """A tensor's name in a text-only checkpoint; multimodal ones nest the language model."""
  for prefix in ("language_model.model.", "model.language_model."):
    if name.startswith(prefix):
      return "model." + name.removeprefix(prefix)
  return name.removeprefix("language_model.")


def _ignored(name: str, config: DecoderConfig) -> bool:
  """Whether a tensor is none of the decoder's: a buffer, a tied copy, the vision part."""
  vision = ("vision_tower.", "multi_modal_projector.")
  return (
    name.endswith("rotary_emb.inv_freq")
    or name.removeprefix("model.").startswith(vision)
    or (config.tied and name == "lm_head.weight")
  )
