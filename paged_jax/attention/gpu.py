"""Paged attention for NVIDIA GPUs of compute capability 8.0 and later (Pallas, Triton).

A program handles a tile of a block's queries, all for one KV head, and one share of the tokens that
they see. It walks them in chunks, from the first that the window reaches to the last that causality
allows; loads run ahead of products, keys and values through the block table. Where there are too
few programs to fill the GPU each row is split, and the shares of a row, as long as each other, are
merged by their LSE. The grid is static: a program of a block without tokens ends at once.

    # tokens seen    [chunk 0][chunk 1][chunk 2][chunk 3][chunk 4]
    # 2 splits        split 0 ................. split 1 .........

The kernel reads and writes tokens where they are in the batch: in small batches, arranging blocks
first and their outputs after would launch kernels that cost as much as the attention itself. Where
each token is a block of its own, programs go by token, and write those that attend to nothing, too.

Numbers of 8 bits become the queries' bfloat16, which is exact, or float32. Their scales are
multiplied with the logits and the weights, not with the keys and values.

Letters as in types.py; G blocks, M = queries of a block x query heads per KV head, W splits, I
queries in a tile, X positions in a chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from paged_jax import pages as pages_lib
from paged_jax.attention import softmax, splits
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Part, Tables

HEAD_DIMS = 16, 32, 64, 128, 256
CHUNK_BYTES = 2**15
TILE_CHANNELS = 2**14  # queries of a tile x head dim, at most
PIECE_8_BITS = 64  # channels of 8-bit keys that are converted at once: all of them would spill
_NEVER = jnp.iinfo(jnp.int32).max


class Config(NamedTuple):
  """How one kernel is cut."""

  tile_size: int  # queries, fewer where they are more than TILE_CHANNELS
  chunk_size: int  # tokens, fewer where they are more than CHUNK_BYTES
  num_warps: int
  num_stages: int


# By bits of the numbers in pages, 32 where products are of float32; then the most queries M of a
# block: of rows that decode, of rows that verify drafts, of prompts. Not tuned on hardware: chosen
# 2026-11 by what jax 0.12.0's compiler makes for H200, A100 and L4 (benchmarks/gpu_compiler.py):
# nothing spills, and shared memory fits in the 99 KB of compute capability 8.6 and 8.9. Rows that
# decode leave room for three programs on an SM; prompts take large tiles, since each tile reads the
# row's keys and values again. Through the block table a chunk ahead takes two stages. Chunks of as
# many tokens as threads would not have their ids loaded ahead.
CONFIGS = {
  8: {
    16: Config(tile_size=16, chunk_size=64, num_warps=4, num_stages=5),
    64: Config(tile_size=64, chunk_size=64, num_warps=8, num_stages=3),
    _NEVER: Config(tile_size=128, chunk_size=32, num_warps=8, num_stages=3),
  },
  16: {
    16: Config(tile_size=16, chunk_size=64, num_warps=8, num_stages=5),
    64: Config(tile_size=64, chunk_size=64, num_warps=8, num_stages=3),
    _NEVER: Config(tile_size=128, chunk_size=32, num_warps=8, num_stages=3),
  },
  32: {
    16: Config(tile_size=16, chunk_size=16, num_warps=4, num_stages=5),
    _NEVER: Config(tile_size=16, chunk_size=16, num_warps=4, num_stages=3),
  },
}


def refusal(pages: Pages, pages_per_row: int) -> str | None:
  """Why the kernel cannot serve `pages`, None if it can; without a GPU no device is judged."""
  del pages_per_row  # any number
  if jax.default_backend() == "gpu":
    capability = jax.devices()[0].compute_capability
    least = 8.9 if pages.dtype == jnp.float8_e4m3fn else 8.0
    if not capability[:1].isdigit() or float(capability) < least:
      why = f" for {pages.dtype}" if least > 8 else ""
      return f"the GPU must have compute capability {least} or later{why}, not {capability}"
  return pages_refusal(pages)


def pages_refusal(pages: Pages) -> str | None:
  """Why no device can serve `pages`."""
  _, _, _, _, d = pages_lib.sizes(pages)
  # Offsets count elements in 32 signed bits, in 64 if the array has more than 4 GiB
  # (jax/_src/pallas/triton/lowering.py): right for 16 and 32 bits, wrong for 8 between 2 and 4 GiB.
  num_bytes = pages.kv.size * pages.kv.dtype.itemsize
  if pages.kv.size > 2**31 and num_bytes <= 2**32:
    return (
      f"8-bit pages must take at most {2**31} bytes or more than {2**32} (scales not counted), not"
      f" {num_bytes}: take fewer or more pages"
    )
  size, many = pages.value_dim, "a power of two from 16 to 256"
  pads = "(CacheConfig.stored_for pads smaller ones)"
  if size is None:
    return None if d in HEAD_DIMS else f"head_dim must be {many}, not {d} {pads}"
  if size not in (*HEAD_DIMS, 512):
    return f"value_dim must be a power of two from 16 to 512, not {size}"
  if d - size not in (0, *HEAD_DIMS):
    return f"head_dim must be value_dim={size} or {many} more, not {d} {pads}"
  return None


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  part: Part,
  options: Options,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  b, num_heads, d = q.shape
  _, _, h, t, _ = pages_lib.sizes(pages)
  keys, values = ((0, d),), (d, 2 * d)  # channels of a token
  if (size := pages.value_dim) is not None:
    keys, values = ((0, size), (size, d)) if size < d else ((0, d),), (0, size)
  if pages.scales is not None:
    keys = tuple(
      (i, min(i + PIECE_8_BITS, end))
      for begin, end in keys
      for i in range(begin, end, PIECE_8_BITS)
    )
  width = values[1] - values[0]
  m = part.block_size * (num_heads // h)
  dtype = softmax.operand_dtype(q.dtype, pages.dtype)
  bits = 32 if dtype == jnp.float32 else 8 * pages.dtype.itemsize
  config = next(c for most, c in CONFIGS[bits].items() if m <= most)
  tile_size = min(config.tile_size, TILE_CHANNELS // width, max(16, pl.next_power_of_2(m)))
  num_tiles = pl.cdiv(m, tile_size)
  alone = part.block_size == 1
  blocks = part.blocks
  by_block = (None, None) if alone else (blocks.first, blocks.lengths)
  rows, starts = (part.rows, part.starts) if alone else (blocks.rows, blocks.starts)
  fitting = CHUNK_BYTES // (pages.kv.shape[-1] * dtype.itemsize)
  chunk_size = min(config.chunk_size, max(16, 1 << (fitting.bit_length() - 1)))
  capacity = tables.block_tables.shape[1] * t
  num_blocks = rows.shape[0]
  num_splits = splits.count(
    num_blocks * num_tiles * h, pl.cdiv(capacity, chunk_size), splits.num_sms()
  )

  out, lse = pl.pallas_call(
    functools.partial(
      _kernel,
      kv_dtype=pages.dtype,
      dtype=dtype,
      keys=keys,
      values=values,
      tile_size=tile_size,
      chunk_size=chunk_size,
      num_tiles=num_tiles,
    ),
    grid=(num_blocks * num_tiles, h, num_splits),
    out_shape=[
      jax.ShapeDtypeStruct(
        (num_splits, b, num_heads, width), q.dtype if num_splits == 1 else jnp.float32
      ),
      jax.ShapeDtypeStruct((num_splits, b, num_heads), jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(
      num_warps=config.num_warps, num_stages=config.num_stages
    ),
    interpret=interpret,
    name="paged_attention",
  )(
    layer[None], options.window[None], options.scale[None],
    None if options.softcap is None else options.softcap[None], options.sinks,
    *by_block, rows, starts, part.last, tables.block_tables, q, pages.kv, pages.scales,
  )  # fmt: skip
  out, lse = (out[0], lse[0]) if num_splits == 1 else splits.combine(out, lse)
  if alone:
    return out.astype(q.dtype), lse
  live = part.last >= 0  # what is not was not written
  out = jnp.where(live[:, None, None], out.astype(q.dtype), jnp.zeros((), q.dtype))
  return out, jnp.where(live[:, None], lse, -jnp.inf)


def _kernel(
  # inputs
  layer_ref,  # i32[1]
  window_ref,  # i32[1]
  scale_ref,  # f32[1]
  softcap_ref,  # f32[1] or None
  sinks_ref,  # f32[Q] or None
  first_ref,  # i32[G] first token of each, None where each token is a block
  lengths_ref,  # i32[G] or None
  rows_ref,  # i32[G]
  starts_ref,  # i32[G]
  last_ref,  # i32[B]
  tables_ref,  # i32[S,P]
  q_ref,  # [B,Q,D]
  kv_ref,  # [N,L,H,T,2D]
  scales_ref,  # f32[N,L,2H,T] or None
  # outputs
  out_ref,  # [W,B,Q,D]
  lse_ref,  # f32[W,B,Q]
  *,
  kv_dtype,
  dtype,
  keys: tuple[tuple[int, int], ...],
  values: tuple[int, int],
  tile_size: int,
  chunk_size: int,
  num_tiles: int,
):
  """Attention of a tile of queries over a share of the row.

  `keys` are the channels of a token that are its key, in pieces whose sizes are powers of two;
  `values` are those of its value, one of these pieces or beside them:

      # channels    [key | value]     [value, a piece of the key | rest of the key]
  """
  n, _, h, t, _ = kv_ref.shape
  _, num_heads, _ = q_ref.shape
  width = values[1] - values[0]
  repeats = num_heads // h
  g, tile = jax.lax.div(pl.program_id(0), num_tiles), jax.lax.rem(pl.program_id(0), num_tiles)
  head, split, num_splits = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  layer = layer_ref[0]
  token, length = (g, 1) if first_ref is None else (first_ref[g], lengths_ref[g])

  @pl.when(tile * tile_size < length * repeats)  # else there is nothing of this tile
  def _():
    # who asks
    nth = tile * tile_size + jnp.arange(tile_size, dtype=jnp.int32)
    tokens = token + jax.lax.div(nth, repeats)
    heads = head * repeats + jax.lax.rem(nth, repeats)
    ours = jax.lax.div(nth, repeats) < length
    last = plgpu.load(last_ref.at[tokens], mask=ours, other=-1)
    attends = last >= 0

    def load_queries(piece):
      place = tokens[:, None], heads[:, None], jnp.arange(*piece)[None]
      return plgpu.load(q_ref.at[place], mask=attends[:, None], other=0).astype(dtype)

    queries = [load_queries(piece) for piece in keys]

    # what they see
    row = rows_ref[g]
    first = jnp.maximum(starts_ref[g], last - window_ref[0] + 1)
    begin = jnp.min(jnp.where(last < 0, _NEVER, first))
    end = jnp.minimum(jnp.max(last) + 1, tables_ref.shape[1] * t)
    share = pl.cdiv(pl.cdiv(jnp.maximum(end - begin, 0), chunk_size), num_splits)
    begin = begin + split * share * chunk_size

    def add_chunk(number, sums):
      at = begin + number * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
      ids = plgpu.load(tables_ref.at[row, jax.lax.div(at, t)], mask=at < end, other=n)
      mapped = ids < n

      def load(channel):
        place = ids[:, None], layer, head, jax.lax.rem(at, t)[:, None], channel[None]
        zero = jnp.zeros((), kv_ref.dtype)  # 0 * NaN is NaN
        bits = plgpu.load(kv_ref.at[place], mask=mapped[:, None], other=zero)
        return jax.lax.bitcast_convert_type(bits, kv_dtype).astype(dtype)

      def load_scales(nth):
        """f32[1,X] those of the keys (0) or of the values (-1), which may be the same."""
        each = scales_ref.shape[2] // h
        place = ids, layer, head * each + nth % each, jax.lax.rem(at, t)
        return plgpu.load(scales_ref.at[place], mask=mapped, other=0)[None]

      pieces = dict.fromkeys((*keys, values))  # none is loaded twice
      pieces = {piece: load(jnp.arange(*piece, dtype=jnp.int32)) for piece in pieces}
      seen = (at[None] >= first[:, None]) & (at[None] <= last[:, None]) & mapped[None]
      softcap = None if softcap_ref is None else softcap_ref[0]
      products = [softmax.product(q, pieces[piece]) for q, piece in zip(queries, keys)]
      products = functools.reduce(jnp.add, products)
      products = products if scales_ref is None else products * load_scales(0)
      logits = softmax.logits(products, seen, scale_ref[0], softcap)
      v_scales = None if scales_ref is None else load_scales(-1)
      return softmax.step(sums, logits, pieces[values], scales=v_scales)

    top = jnp.full(tile_size, -jnp.inf, jnp.float32)
    if sinks_ref is not None:  # they count once
      top = plgpu.load(sinks_ref.at[heads], mask=attends & (split == 0), other=-jnp.inf)
    total = jnp.where(top == -jnp.inf, 0.0, 1.0)
    sums = softmax.Sums(top[:, None], total[:, None], jnp.zeros((tile_size, width), jnp.float32))
    count = jnp.minimum(share, pl.cdiv(jnp.maximum(end - begin, 0), chunk_size))
    out, lse = softmax.finish(jax.lax.fori_loop(0, count, add_chunk, sums))
    place = split, tokens[:, None], heads[:, None]
    plgpu.store(
      out_ref.at[(*place, jnp.arange(width)[None])], out.astype(out_ref.dtype), mask=ours[:, None]
    )
    plgpu.store(lse_ref.at[place], lse, mask=ours[:, None])


BACKEND = Backend(attend, refusal)
