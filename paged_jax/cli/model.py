"""The model that a command works on, and the memory for its cache."""

import contextlib
import enum
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer

from paged_jax import groups, models
from paged_jax.config import CacheConfig

Configs = CacheConfig | tuple[CacheConfig, ...]


class Dtype(enum.StrEnum):
  """Of weights."""

  float32 = "float32"
  bfloat16 = "bfloat16"
  float16 = "float16"


class KvDtype(enum.StrEnum):
  """Of keys and values."""

  float32 = "float32"
  bfloat16 = "bfloat16"
  float16 = "float16"
  int8 = "int8"
  float8_e4m3fn = "float8_e4m3fn"


# Options that commands share.
Folder = Annotated[
  Path | None, typer.Option(help="Hugging Face checkpoint folder; default: a small Shakespeare.")
]
PageSize = Annotated[
  int | None, typer.Option(min=1, help="Tokens per page; default: 16, or 128 of 8 bits on TPU.")
]
Weights = Annotated[Dtype | None, typer.Option(help="Default: as the checkpoint says.")]
KvDtypes = Annotated[
  list[KvDtype] | None,
  typer.Option(
    "--kv-dtype",
    help="Of the cache; default: as the weights. int8 and float8_e4m3fn take about half the memory"
    " of 16 bits. Repeatable: one for each group of layers.",
  ),
]


def kv_dtypes(decoder: models.Decoder, asked: list[KvDtype] | None) -> tuple:
  """The dtype of each group's cache.

  Raises:
    ValueError: There are several, and not as many as groups.
  """
  count = len(decoder.config.groups)
  if not asked:
    return (decoder.embed_tokens.weight.dtype,) * count
  if len(asked) not in (1, count):
    names = " ".join(asked)
    raise ValueError(f"--kv-dtype takes one, or one for each of {count} groups, got {names}")
  dtypes = tuple(np.dtype(name) for name in asked)
  return dtypes * count if len(dtypes) == 1 else dtypes


def folder(model: Path | None) -> Path:
  """The model's folder: the one that is asked for, or by default the embedded model's.

  Raises:
    ValueError: It is missing, or has no config.json.
  """
  path = models.embedded() if model is None else model
  if not path.is_dir():
    raise ValueError(f"there is no model folder {path}")
  if not (path / "config.json").is_file():
    raise ValueError(f"{path} is no checkpoint: it has no config.json")
  return path


def free_bytes() -> int:
  """Memory that a cache may take: most of what is free on the device, or half of a host's."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return int(0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2


@contextlib.contextmanager
def memory_for(config: Configs) -> Iterator[None]:
  """Turns a failed allocation into an error that says how large the cache is."""
  try:
    yield
  except jax.errors.JaxRuntimeError:
    size = sum(each.num_pages * each.page_bytes for each in groups.each(config))
    raise ValueError(
      f"there is no memory for a cache of {size:,} bytes; --num-pages asks for a smaller one"
    ) from None
