"""Hugging Face checkpoints: `config.json` and `*.safetensors`, to and from a `Decoder`."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from paged_jax import meshes
from paged_jax.models import added_tokens, families, fields, placement, tensors
from paged_jax.models.config import DecoderConfig
from paged_jax.models.decoder import Decoder, abstract

DTYPES = {  # of weights, by the names that `torch` has for them
  "float32": "float32",
  "float": "float32",
  "bfloat16": "bfloat16",
  "float16": "float16",
  "half": "float16",
}


def load(
  path: str | os.PathLike, dtype: Any = None, *, mesh: Mesh | None = None, axis: str | None = None
) -> Decoder:
  """The decoder saved in the folder `path`, read tensor by tensor.

  As in `transformers`: the values of missing fields, and which file wins.

  Args:
    path: A folder with `config.json` and either `model.safetensors` or shards and their index.
    dtype: Of the weights: float32, bfloat16 or float16. None takes the dtype that `config.json`
      states, or else the stored one.
    mesh: Its devices share the weights (tensor parallelism, see `placement`): each reads its own
      part of the files, and no device or host has all. Its axes must be Auto.
    axis: The axis of the mesh, the last one by default.

  Raises:
    FileNotFoundError: A file is missing; the message names it.
    ValueError: A file is damaged, the model is not supported, a weight is too large for the dtype,
      or the mesh does not fit the model; the message says which and how.

  >>> from paged_jax import models
  >>> models.load(models.embedded()).config.num_layers
  4
  """
  path = Path(path)
  wanted = None if dtype is None else _dtype("dtype", dtype)
  raw = _read_config(path)
  try:
    config, stated = families.read(raw), _stated_dtype(raw)
  except ValueError as error:
    raise ValueError(f"{path / 'config.json'}: {error}") from None
  found = tensors.find(path)
  wanted = wanted or stated or _dtype("dtype of the weights", tensors.dtype(path, found))
  config, found = _untied(config, _needed(config, found))
  graph, state = nnx.split(abstract(config))
  leaves = dict(nnx.to_flat_state(state))
  shapes = {name: np.broadcast_to(np.int8(0), leaf.shape) for name, leaf in leaves.items()}
  shapes = {name: part.shape for name, part in parts(shapes, config).items()}
  tensors.check(found, shapes, path)
  if mesh is not None:
    meshes.check_auto(mesh)
    name = meshes.axis_name(mesh, axis)
    for leaf_path, leaf in leaves.items():
      spec = placement.spec(config, leaf_path, leaf.shape, mesh, name)
      part = functools.partial(
        _part, [found[x] for x in names(leaf_path, config)], leaf_path, wanted
      )
      where = NamedSharding(mesh, spec)
      leaves[leaf_path] = leaf.replace(jax.make_array_from_callback(leaf.shape, where, part))
    return nnx.merge(graph, nnx.from_flat_state(list(leaves.items())))
  arrays = {name: np.empty(leaf.shape, wanted) for name, leaf in leaves.items()}
  tensors.fill(parts(arrays, config), found)
  for name, leaf in leaves.items():  # one at a time: never a second copy of all weights
    leaves[name] = leaf.replace(jnp.asarray(arrays.pop(name)))
  return nnx.merge(graph, nnx.from_flat_state(list(leaves.items())))


def _part(found: list[tensors.Stored], path: tuple, dtype: np.dtype, index: Any) -> np.ndarray:
  """The part `index` of a parameter, whose layers are tensors of the checkpoint."""
  if path[0] != "layers":
    return tensors.read(found[0], index, dtype)
  return np.stack([tensors.read(tensor, index[1:], dtype) for tensor in found[index[0]]])


def save(decoder: Decoder, path: str | os.PathLike) -> None:
  """Writes `config.json` and `model.safetensors` of a Llama into the folder `path`.

  Raises:
    ValueError: The model is of another family.

  >>> import tempfile
  >>> from paged_jax import models
  >>> decoder = models.load(models.embedded())
  >>> with tempfile.TemporaryDirectory() as path:
  ...   models.save(decoder, path)
  ...   models.load(path).config == decoder.config
  True
  """
  path = Path(path)
  path.mkdir(parents=True, exist_ok=True)
  leaves = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
  arrays = {name: np.asarray(leaf[...]) for name, leaf in leaves}
  dtype = next(iter(arrays.values())).dtype.name
  raw = families.write(decoder.config) | {"dtype": dtype}
  (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
  named = parts(arrays, decoder.config)
  safetensors.numpy.save_file(named, path / "model.safetensors", {"format": "pt"})


def tokenizer(path: str | os.PathLike) -> tokenizers.Tokenizer | None:
  """The tokenizer of the folder `path`, or None if it has no `tokenizer.json`.

  It does not truncate or pad, even if `tokenizer.json` says so. It knows the tokens that only
  `tokenizer_config.json`, `added_tokens.json` or `special_tokens_map.json` name.

  Raises:
    ValueError: A file is damaged, or a token cannot have the id that it states; the message names
      the file.

  >>> from paged_jax import models
  >>> words = models.tokenizer(models.embedded())
  >>> words.decode(words.encode("To be, or not to be").ids)
  'To be, or not to be'
  """
  file = Path(path) / "tokenizer.json"
  if not file.exists():
    return None
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(f"{file} is not a tokenizer: {error}") from None
  added_tokens.add(tokenizer, Path(path))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def eos_tokens(path: str | os.PathLike) -> tuple[int, ...]:
  """Ids of the tokens that end a text, from `generation_config.json`, or else from `config.json`.

  As in `transformers`: a `generation_config.json` without such ids means that no token ends a text,
  and a `config.json` without them may have them in its `text_config`.

  Raises:
    FileNotFoundError: Both files are missing.
    ValueError: A file is damaged, or an id is not a token; the message names file and field.

  >>> from paged_jax import models
  >>> models.eos_tokens(models.embedded())
  ()
  """
  file = Path(path) / "generation_config.json"
  if file.exists():
    ids = fields.read(file).get("eos_token_id")
  else:
    file, raw = Path(path) / "config.json", _read_config(Path(path))
    ids = raw.get("eos_token_id")
    if ids is None:
      try:
        ids = fields.mapping(raw, "text_config").get("eos_token_id")
      except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
  listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
  if not all(type(i) is int and 0 <= i <= fields.LARGEST for i in listed):
    raise ValueError(f"{file}: {fields.wrong('eos_token_id', 'a token or a list of tokens', ids)}")
  return tuple(listed)


def _read_config(path: Path) -> dict[str, Any]:
  """The `config.json` of a folder."""
  if not (path / "config.json").exists():
    raise FileNotFoundError(f"{path} is no checkpoint: it has no config.json")
  return fields.read(path / "config.json")


def _stated_dtype(raw: dict[str, Any]) -> np.dtype | None:
  """The dtype that `config.json` states, by its newer or older name; None if it states none."""
  name = "torch_dtype" if raw.get("dtype") is None else "dtype"
  stated = raw.get(name)
  return None if stated in (None, "auto") else _dtype(name, stated)


def _dtype(name: str, stated: Any) -> np.dtype:
  """A dtype that weights may have."""
  try:
    known = stated.removeprefix("torch.") if isinstance(stated, str) else jnp.dtype(stated).name
  except TypeError:
    known = None
  if known not in DTYPES:
    raise fields.wrong(name, "float32, bfloat16 or float16", stated)
  return jnp.dtype(DTYPES[known])


def _needed(config: DecoderConfig, found: dict[str, tensors.Stored]) -> dict[str, tensors.Stored]:
  """The tensors without those of keys and values that layers have but do not use (Gemma 4)."""
  unused = tuple(
    f"model.layers.{i}.self_attn.{name}."
    for i, shape in enumerate(config.layers)
    if not shape.own
    for name in ("k_proj", "v_proj", "k_norm", "v_norm")
  )
  return {name: tensor for name, tensor in found.items() if not name.startswith(unused)}


def _untied(
  config: DecoderConfig, found: dict[str, tensors.Stored]
) -> tuple[DecoderConfig, dict[str, tensors.Stored]]:
  """The configuration and tensors, not tied if the stored head and embedding differ."""
  head, embedding = tensors.HEAD, tensors.EMBEDDING
  if not config.tied or head not in found:
    return config, found
  if not tensors.tied(found):
    return dataclasses.replace(config, tied=False), found
  found = {embedding: found[head]} | found  # if only the head is stored, it is both
  return config, {name: tensor for name, tensor in found.items() if name != head}


def names(path: tuple, config: DecoderConfig) -> list[str]:
  """The tensors of a checkpoint that make a parameter: one for each layer of a stack, or one."""
  module, *rest = path
  if module == "layers":
    stack = rest.pop(0) if isinstance(rest[0], int) else 0  # one of several stacks
    name = ".".join(rest)
    return [f"model.layers.{i}.{name}" for i in config.stacks[stack]]
  name = ".".join(path)
  return [name if module == "lm_head" else f"model.{name}"]


def parts(arrays: Mapping[Any, np.ndarray], config: DecoderConfig) -> dict[str, np.ndarray]:
  """Views of the stacked `arrays` (by path), one per tensor of a checkpoint, by its name."""
  found = {}
  for path, array in arrays.items():
    found |= zip(names(path, config), array if path[0] == "layers" else [array])
  return found
