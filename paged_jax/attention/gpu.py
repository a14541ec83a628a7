"""Paged attention for NVIDIA GPUs (Pallas, Triton).

A program handles a tile of one block's queries against one KV head, and, where there are fewer
programs than the GPU can run, a share of the positions that the tile sees; the shares' outputs are
merged by their LSE. It walks its positions in chunks of X: page ids first, then keys and values by
them, both loaded some stages ahead. No program waits for another.

    # row        0 ............................... 190
    # tile sees              begin ............... end     its first to its last query's position
    # splits                 [c0  c1  c2] [c3  c4]         shares of whole chunks

Letters as in types.py; G blocks, M queries of a block x query heads per KV head, X positions of a
chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import softmax, splits
from paged_jax.types import Pages, Plan, Tables

MIN_CAPABILITY = 8.0


class Config(NamedTuple):
  """How a program works. It serves keys, and tiles, of at most the sizes given here."""

  key_bytes: int
  tile: int  # queries
  chunk: int  # positions, X
  num_warps: int
  num_stages: int


# 2026-11-24: by the registers and shared memory that the compiler reports; not tuned on hardware.
# All fit in the 99 KiB of the smaller GPUs. A chunk is loaded (num_stages - 1) // 2 chunks ahead,
# because page ids, which come first, take as many stages.
_CONFIGS = (
  Config(key_bytes=128, tile=32, chunk=64, num_warps=4, num_stages=7),
  Config(key_bytes=128, tile=64, chunk=64, num_warps=4, num_stages=5),
  Config(key_bytes=256, tile=32, chunk=64, num_warps=4, num_stages=5),
  Config(key_bytes=256, tile=64, chunk=64, num_warps=4, num_stages=3),
  Config(key_bytes=512, tile=32, chunk=32, num_warps=8, num_stages=5),
  Config(key_bytes=512, tile=64, chunk=32, num_warps=8, num_stages=3),
  Config(key_bytes=1024, tile=32, chunk=16, num_warps=8, num_stages=3),
)
_MIN_TILE = 16  # rows of the smallest matrix product
_MAX_TILE = {2: 64, 4: 16}  # by itemsize: exact float32 products would spill registers


def refusal(pages: Pages) -> str | None:
  """Why the kernel cannot serve `pages` on this machine, None if it can.

  Without a GPU only shapes and dtypes count, so that programs can be compiled ahead of time.
  """
  if jax.default_backend() == "gpu":
    why = _device_refusal(jax.devices()[0].compute_capability)
    if why is not None:
      return why
  return _pages_refusal(pages)


def _device_refusal(capability: str) -> str | None:
  if capability[0].isdigit() and float(capability) >= MIN_CAPABILITY:
    return None
  return f"the GPU must be of compute capability {MIN_CAPABILITY} or more, not {capability}"


def _pages_refusal(pages: Pages) -> str | None:
  d = pages_lib.sizes(pages)[-1]
  if pages.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f"pages must hold float32, bfloat16 or float16, not {pages.dtype}"
  if d not in (16, 32, 64, 128, 256):
    return f"head_dim must be a power of two from 16 to 256, not {d}"
  return None


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  plan: Plan,
  *,
  scale: jax.Array,
  window: jax.Array,
  softcap: jax.Array | None,
  sinks: jax.Array | None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  _, _, h, t, d = pages_lib.sizes(pages)
  blocks = blocks_lib.make(q, h, tables, plan, window)
  g, _, m, _ = blocks.queries.shape
  dtype = pages.dtype if q.dtype == pages.dtype else np.dtype("float32")  # of the products
  tile = min(_MAX_TILE[dtype.itemsize], max(_MIN_TILE, pl.next_power_of_2(m)))
  config = _config(d * dtype.itemsize, tile)
  num_tiles = pl.cdiv(m, tile)
  rows = num_tiles * tile
  num_chunks = pl.cdiv(tables.block_tables.shape[1] * t, config.chunk)
  num_splits = splits.count(g * num_tiles * h, num_chunks, splits.num_sms())
  sums = blocks_lib.start(blocks.queries[0, ..., :1], sinks)
  scalars = jnp.stack([scale, jnp.float32(0) if softcap is None else softcap])

  def padded(x, value):
    """M padded to whole tiles; it is the last axis but one."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - m), (0, 0)], constant_values=value)

  def of_tile(width):
    return pl.BlockSpec((None, tile, width), lambda i, *_: (i // num_tiles, i % num_tiles, 0))

  def of_head(width):
    return pl.BlockSpec((None, tile, width), lambda i, head, _: (head, i % num_tiles, 0))

  def of_split(width):
    return pl.BlockSpec(
      (None, None, None, tile, width),
      lambda i, head, split: (split, i // num_tiles, head, i % num_tiles, 0),
    )

  out, lse = pl.pallas_call(
    functools.partial(
      _kernel, chunk=config.chunk, dtype=pages.dtype, softcapped=softcap is not None
    ),
    grid=(g * num_tiles, h, num_splits),
    in_specs=[
      pl.BlockSpec((1,), lambda i, *_: (i // num_tiles,)),
      pl.BlockSpec(),
      pl.BlockSpec(),
      pl.BlockSpec(
        (None, None, tile, d), lambda i, head, _: (i // num_tiles, head, i % num_tiles, 0)
      ),
      of_tile(1),
      of_tile(1),
      of_head(1),
      of_head(1),
      pl.BlockSpec(),
      pl.BlockSpec(),
    ],
    out_specs=[of_split(d), of_split(1)],
    out_shape=[
      jax.ShapeDtypeStruct((num_splits, g, h, rows, d), q.dtype if num_splits == 1 else jnp.float32),
      jax.ShapeDtypeStruct((num_splits, g, h, rows, 1), jnp.float32),
    ],
    compiler_params=triton.CompilerParams(
      num_warps=config.num_warps, num_stages=config.num_stages
    ),
    interpret=interpret,
    name="paged_attention",
  )(
    blocks.rows, layer[None], scalars, padded(blocks.queries, 0),
    padded(blocks.first[..., None], jnp.iinfo(jnp.int32).max), padded(blocks.last[..., None], -1),
    padded(sums.top, -jnp.inf), padded(sums.total, 0), tables.block_tables, pages.kv,
  )  # fmt: skip
  out, lse = (x[..., :m, :] for x in (out, lse))
  out, lse = (out[0], lse[0]) if num_splits == 1 else splits.combine(out, lse, None)
  return blocks_lib.by_token(q, blocks, out, lse)


def _config(key_bytes: int, tile: int) -> Config:
  return next(c for c in _CONFIGS if key_bytes <= c.key_bytes and tile <= c.tile)


def _kernel(
  # inputs
  row_ref,  # i32[1]
  layer_ref,  # i32[1]
  scalars_ref,  # f32[2] scale, softcap
  q_ref,  # [M,D] of a tile
  first_ref,  # i32[M,1]
  last_ref,  # i32[M,1]
  top_ref,  # f32[M,1]
  total_ref,  # f32[M,1]
  tables_ref,  # i32[S,P]
  kv_ref,  # [N,L,H,T,2D] offsets into it are 64-bit beyond 4 GiB, see tests
  # outputs
  out_ref,  # [M,D]
  lse_ref,  # f32[M,1]
  *,
  chunk: int,
  dtype,
  softcapped: bool,
):
  num_pages, num_layers, _, t, width = kv_ref.shape
  d = width // 2
  head, split, num_shares = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  row = jnp.minimum(row_ref[0], tables_ref.shape[0] - 1)
  layer = layer_ref[0]
  scale, softcap = scalars_ref[0], scalars_ref[1]
  first, last = first_ref[...], last_ref[...]
  q = q_ref[...]
  if q.dtype != dtype:
    q = q.astype(jnp.float32)

  begin = jnp.min(first_ref[:, 0])
  end = jnp.where(layer < num_layers, jnp.max(last_ref[:, 0]) + 1, 0)
  num_chunks = pl.cdiv(jnp.maximum(end - begin, 0), chunk)
  share = pl.cdiv(num_chunks, num_shares)
  lanes = jnp.arange(d, dtype=jnp.int32)

  def load(ids, at, lanes):
    """Lanes of one head at positions `at` of pages `ids`, 0 where there is no page."""
    there = kv_ref.at[ids[:, None], layer, head, (at % t)[:, None], lanes[None]]
    bits = triton.load(there, mask=(ids < num_pages)[:, None], other=0)
    return jax.lax.bitcast_convert_type(bits, dtype).astype(q.dtype)

  def add_chunk(number, sums):
    at = begin + number * chunk + jnp.arange(chunk, dtype=jnp.int32)
    ids = triton.load(tables_ref.at[row, at // t], mask=at < end, other=num_pages)
    k, v = load(ids, at, lanes), load(ids, at, lanes + d)
    logits = _dot(q, k, 1) * scale
    if softcapped:
      logits = softcap * jnp.tanh(logits / softcap)
    seen = (at[None] >= first) & (at[None] <= last) & (ids < num_pages)[None]
    logits = jnp.where(seen, logits, -jnp.inf)
    return softmax.step(sums, logits, lambda weights: _dot(weights.astype(v.dtype), v, 0))

  own = split == 0  # sinks belong to one share, or they count more than once
  start = softmax.Sums(
    top=jnp.where(own, top_ref[...], -jnp.inf),
    total=jnp.where(own, total_ref[...], 0),
    acc=jnp.zeros(q.shape, jnp.float32),
  )
  stop = jnp.minimum((split + 1) * share, num_chunks)
  sums = jax.lax.fori_loop(split * share, stop, add_chunk, start)
  out, lse_ref[...] = softmax.finish(sums)
  out_ref[...] = out.astype(out_ref.dtype)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """[M,K] times b, over its `axis`, in float32."""
  precision = "highest" if b.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )
