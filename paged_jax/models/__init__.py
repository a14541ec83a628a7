"""A decoder on the paged cache, and Hugging Face checkpoints for it."""

from pathlib import Path

from paged_jax.models.caches import cache_config as cache_config
from paged_jax.models.caches import default_page_size as default_page_size
from paged_jax.models.caches import describe as describe
from paged_jax.models.config import DecoderConfig as DecoderConfig
from paged_jax.models.config import Experts as Experts
from paged_jax.models.config import Group as Group
from paged_jax.models.config import Latent as Latent
from paged_jax.models.config import Shape as Shape
from paged_jax.models.decoder import Decoder as Decoder
from paged_jax.models.loading import eos_tokens as eos_tokens
from paged_jax.models.loading import load as load
from paged_jax.models.loading import save as save
from paged_jax.models.loading import tokenizer as tokenizer
from paged_jax.models.ropes import Rope as Rope

__all__ = [
  "Decoder", "DecoderConfig", "Experts", "Group", "Latent", "Rope", "Shape", "cache_config", "default_page_size", "describe", "embedded", "eos_tokens", "load", "save",
  "tokenizer",
]  # fmt: skip


def embedded() -> Path:
  """The folder of the model that comes with the package.

  >>> from paged_jax import models
  >>> (models.embedded() / "config.json").exists()
  True
  """
  return Path(__file__).parent / "embedded"
