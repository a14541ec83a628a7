"""The model that a command works on, and the memory for its cache."""

import contextlib
import enum
from collections.abc import Iterator
from pathlib import Path

import jax

from paged_jax import models
from paged_jax.config import CacheConfig


class Dtype(enum.StrEnum):
  """Of weights and cache."""

  float32 = "float32"
  bfloat16 = "bfloat16"
  float16 = "float16"


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


@contextlib.contextmanager
def memory_for(config: CacheConfig) -> Iterator[None]:
  """Turns a failed allocation into an error that says how large the cache is."""
  try:
    yield
  except jax.errors.JaxRuntimeError:
    size = config.num_pages * config.page_bytes
    raise ValueError(
      f"there is no memory for a cache of {size:,} bytes; --num-pages asks for a smaller one"
    ) from None
