"""The tensors of a checkpoint: their files, names and values."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from paged_jax.models import fields

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Stored(NamedTuple):
  """A tensor in a file."""

  file: Path
  name: str  # its name there
  dtype: str  # as safetensors calls it
  shape: tuple[int, ...]


def find(folder: Path) -> dict[str, Stored]:
  """The decoder's tensors in a folder, by their names in a text-only checkpoint.

  `model.safetensors` wins over an index of shards. If two tensors have one name, the one in the
  later file wins. The first entry is the first tensor of the first file.

  Raises:
    FileNotFoundError: A file is missing; the message names it.
    ValueError: A file is damaged; the message names it.
  """
  found = {}
  for file in _files(folder):
    with opened(file) as tensors:
      for stored in tensors.keys():  # noqa: SIM118 (not a mapping)
        header = tensors.get_slice(stored)
        name = _text_name(stored)
        if not _ignored(name):
          found[name] = Stored(file, stored, header.get_dtype(), tuple(header.get_shape()))
  return found


def tied(found: Mapping[str, Stored]) -> bool:
  """Whether the head can be the embedding: one is missing, or both hold the same values."""
  if HEAD not in found or EMBEDDING not in found:
    return True
  head, embedding = found[HEAD], found[EMBEDDING]
  if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
    return False
  return bool(np.array_equal(_array(head), _array(embedding)))


def dtype(folder: Path, found: Mapping[str, Stored]) -> str:
  """The stored dtype of the weights: as the index states, or else of the first tensor."""
  index = folder / "model.safetensors.index.json"
  if not (folder / "model.safetensors").exists() and index.exists():
    stated = fields.read(index).get("metadata")
    if isinstance(stated, dict) and stated.get("dtype") is not None:
      return stated["dtype"]
  known = (DTYPES[tensor.dtype] for tensor in found.values() if tensor.dtype in DTYPES)
  return next(known, "float32")


def check(found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
  """Raises ValueError unless `found` are tensors of these names and shapes."""
  for name, tensor in found.items():
    if name not in shapes:
      raise ValueError(f"{tensor.file} has an unexpected tensor {tensor.name!r}")
    if tensor.dtype not in DTYPES:
      known = " or ".join(DTYPES)
      raise ValueError(
        f"{tensor.file}: dtype of {tensor.name!r} must be {known}, got {tensor.dtype}"
      )
    if tensor.shape != shapes[name]:
      raise ValueError(
        f"{tensor.file}: shape of {tensor.name!r} must be {shapes[name]}, got {tensor.shape}"
      )
  if missing := set(shapes) - set(found):
    raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {min(missing)!r}")


def fill(parts: Mapping[str, np.ndarray], found: Mapping[str, Stored]) -> None:
  """Reads every tensor into its part, one at a time.

  Raises:
    ValueError: A value does not fit the part's dtype; the message names tensor and value.
  """
  for file in dict.fromkeys(tensor.file for tensor in found.values()):
    with opened(file) as tensors:
      for name, tensor in found.items():
        if tensor.file == file:
          _cast(tensors.get_tensor(tensor.name), parts[name], tensor)


def read(tensor: Stored, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
  """A part of a tensor in this dtype; the rest of the file is not read.

  Raises:
    ValueError: A value does not fit the dtype; the message names tensor and value.
  """
  with opened(tensor.file) as tensors:
    array = tensors.get_slice(tensor.name)[index]
  part = np.empty(array.shape, dtype)
  _cast(array, part, tensor)
  return part


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
  """An open safetensors file.

  Raises:
    ValueError: The file is damaged; the message names it.
  """
  try:
    with safetensors.safe_open(file, framework="np") as tensors:
      yield tensors
  except safetensors.SafetensorError as error:
    raise ValueError(f"{file} is not a readable safetensors file: {error}") from None


def _array(tensor: Stored) -> np.ndarray:
  with opened(tensor.file) as tensors:
    return tensors.get_tensor(tensor.name)


def _files(folder: Path) -> list[Path]:
  """The single file of tensors, or else the shards that an index lists."""
  whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  files = [whole]
  if not whole.exists() and index.exists():
    files = [folder / name for name in _shards(index)]
  elif not whole.exists() and any(folder.glob("pytorch_model*.bin*")):
    raise FileNotFoundError(f"{whole} does not exist: convert pytorch_model.bin to safetensors")
  for file in files:
    if not file.exists():
      raise FileNotFoundError(f"{file} does not exist")
  return files


def _shards(index: Path) -> list[str]:
  """The names of the files in an index, each once."""
  shards = fields.read(index).get("weight_map")
  if not isinstance(shards, dict):
    raise ValueError(f"{index} has no weight_map")
  for name, file in shards.items():
    if not isinstance(file, str):
      raise ValueError(f"{index}: {fields.wrong(f'weight_map of {name!r}', 'a file name', file)}")
  return sorted(set(shards.values()))


def _cast(array: np.ndarray, part: np.ndarray, tensor: Stored) -> None:
  """Writes an array into a part of another dtype."""
  with np.errstate(over="ignore"):
    part[...] = array
  if jnp.finfo(part.dtype).max >= jnp.finfo(array.dtype).max or np.isfinite(part).all():
    return
  lost = array[np.isfinite(array) & ~np.isfinite(part)]
  if lost.size:
    raise ValueError(
      f"{tensor.file}: {tensor.name!r} has {float(lost[0]):g}, too large for {part.dtype.name}"
    )


def _text_name(name: str) -> str:
  """A tensor's name in a text-only checkpoint; multimodal ones nest the language model."""
  for prefix in ("language_model.model.", "model.language_model."):
    if name.startswith(prefix):
      return "model." + name.removeprefix(prefix)
  return name.removeprefix("language_model.")


def _ignored(name: str) -> bool:
  """Whether a tensor is not part of the decoder: a buffer, or of images and sounds."""
  others = (
    "vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "multi_modal_projector.",
  )  # fmt: skip
  return name.endswith("rotary_emb.inv_freq") or name.removeprefix("model.").startswith(others)
