"""`paged-jax doctor`: versions, the platform, what the cache chooses on it, and whether it is right."""

from importlib import metadata
from typing import Annotated

import jax
import jax.numpy as jnp
import typer

import paged_jax
from paged_jax import attention, models
from paged_jax.cli import model as model_lib
from paged_jax.cli import programs, progress


def run(
  verify: Annotated[
    bool, typer.Option(help="Prove on this device that attention is right; exit code 1 if not.")
  ] = False,
  attention_name: Annotated[
    str | None, typer.Option("--attention", help="Backend to verify; default: what is chosen.")
  ] = None,
  page_size: Annotated[int | None, typer.Option(min=1, help="Tokens per page.")] = None,
  num_kv_heads: Annotated[int, typer.Option(min=1, help="KV heads of a layer.")] = 8,
  num_heads: Annotated[
    int | None, typer.Option(min=1, help="Query heads; default: 4 per KV head.")
  ] = None,
  head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 128,
  dtype: Annotated[
    model_lib.KvDtype, typer.Option(help="Of the cache.")
  ] = model_lib.KvDtype.bfloat16,
) -> None:
  """Shows versions, the platform, and what the cache would choose on it; `--verify` proves it."""
  platform = jax.default_backend()
  page_size = page_size or models.default_page_size(dtype.value)
  config = paged_jax.CacheConfig(
    num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=jnp.dtype(dtype.value)
  ).stored_for(platform)
  names = ("jax", "jaxlib", "flax")
  print("versions:", ", ".join(f"{name} {metadata.version(name)}" for name in names))
  print(f"platform: {platform}, {jax.device_count()} x {jax.devices()[0].device_kind}")
  pages, per_row = jax.eval_shape(lambda: paged_jax.init(config)).pages, config.pages_per_row
  chosen = attention.choose(attention_name, pages, per_row)
  print(f"attention: {chosen}, for {config.dtype} pages of {page_size} x {head_dim}")
  for name in attention.implementations:
    made_for = attention.platform(name)
    elsewhere = None if made_for in (None, platform) else f"compiles for {made_for} only"
    print(f"  {name}: {elsewhere or attention.refusal(name, pages, per_row) or 'can be asked for'}")
  if platform == "tpu" and jax.devices()[0].num_cores > 1:
    print(f"cores: the kernels use 1 of {jax.devices()[0].num_cores} in each chip")
  print(f"{config.dtype} pages: stored as {config.array_dtype}")
  print(f"compiled programs: kept in {programs.folder() or 'memory only'}")
  if verify:
    with progress.bar("verifying") as tell:
      report = attention.verify(chosen, config, num_heads=num_heads, progress=tell)
    print(f"\n{report}")
    raise typer.Exit(int(not report.ok))
