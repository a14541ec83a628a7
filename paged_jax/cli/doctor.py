"""`paged-jax doctor`: versions, the platform, and what the cache chooses on it."""

from importlib import metadata

import jax
import jax.numpy as jnp

import paged_jax
from paged_jax import attention
from paged_jax.cli import programs


def run() -> None:
  """Shows versions, the platform, and what the cache would choose on it."""
  platform = jax.default_backend()
  config = paged_jax.CacheConfig(dtype=jnp.dtype("bfloat16")).stored_for(platform)
  names = ("jax", "jaxlib", "flax")
  print("versions:", ", ".join(f"{name} {metadata.version(name)}" for name in names))
  print(f"platform: {platform}, {jax.device_count()} x {jax.devices()[0].device_kind}")
  pages = jax.eval_shape(lambda: paged_jax.init(config)).pages
  print(f"attention: {attention.choose(None, pages)}, for {config.dtype} pages of 16 x 128")
  for name in attention.implementations:
    made_for = attention.platform(name)
    elsewhere = None if made_for in (None, platform) else f"compiles for {made_for} only"
    print(f"  {name}: {elsewhere or attention.refusal(name, pages) or 'can be asked for'}")
  print(f"bfloat16 pages: stored as {config.array_dtype}")
  print(f"compiled programs: kept in {programs.folder() or 'memory only'}")
