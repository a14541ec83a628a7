"""Paged attention for NVIDIA Hopper (Pallas, Mosaic GPU: wgmma, TMA).

A program handles one tile of up to 128 queries of a block, for one KV head, over one split of the
pages that the block sees. A memory warpgroup walks them in chunks of X positions and fetches each
page, keys and values together, with one TMA copy; one or two compute warpgroups of 64 queries each
follow through a ring of chunks. The grid is static: a program of a block without tokens ends at once.

    # memory    chunk 0   chunk 1   wait until chunk 0 is used, chunk 2 ...
    # compute             chunk 0   chunk 1   ...

A wgmma multiplies 64 rows, a block may have fewer queries. Only these are read and written: TMA
fills what a copy reads beyond the end of an axis with zeros, and drops what it would write there.

    # rows of a wgmma    0 1 2 3 4 5 ... 63
    # in the arrays      [M = 4 ]             one token, four query heads per KV head

Letters as in types.py; G blocks, M queries of a block x query heads per KV head, in Y tiles of
W warpgroups x 64, M8 = M rounded up to a multiple of 8, Z splits, X positions of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_jax import pages as pages_lib
from paged_jax.attention import backend, softmax, splits, wgmma
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Part, Tables

LOG2E = math.log2(math.e)
# head dim: (positions of a chunk, chunks in the ring, most compute warpgroups), what fits into the
# SMEM and the registers of an H200 as compiled by jax 0.12.0, November 2026; not tuned by timing
CHUNKS = {64: (128, 4, 2), 128: (64, 4, 2), 256: (64, 2, 1)}
_API = ("Barrier", "CompilerParams", "Layout", "LoweringSemantics", "SMEM", "WGMMAAccumulatorRef",
        "barrier_arrive", "barrier_wait", "broadcasted_iota", "commit_smem", "copy_gmem_to_smem",
        "copy_smem_to_gmem", "kernel", "layout_cast", "set_max_registers", "wait_smem_to_gmem",
        "wgmma")  # fmt: skip


def refusal(pages: Pages, pages_per_row: int) -> str | None:
  """Why the kernel cannot serve `pages`, None if it can; without a GPU no device is judged."""
  del pages_per_row  # any number
  if missing := [name for name in _API if not hasattr(plgpu, name)]:
    return f"Mosaic GPU of jax {jax.__version__} lacks {', '.join(missing)}"
  if jax.default_backend() == "gpu":
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability != "9.0":
      return f"the GPU must have compute capability 9.0, not {capability}"
  return pages_refusal(pages)


def pages_refusal(pages: Pages) -> str | None:
  """Why no device can serve `pages`."""
  _, _, _, t, d = pages_lib.sizes(pages)
  if pages.value_dim is not None:
    return f"value_dim must be None, not {pages.value_dim}: the kernel reads values beside keys"
  if pages.kv.dtype not in (jnp.bfloat16, jnp.float16):
    return (
      f"pages must be kept as bfloat16 or float16, not {pages.kv.dtype}: wgmma multiplies keys and"
      " values in shared memory as they are kept, by queries and weights of the same dtype"
    )
  if d not in CHUNKS:
    sizes = ", ".join(map(str, CHUNKS))
    return (
      f"head_dim must be one of {sizes}, not {d} (CacheConfig.storage_head_dim pads smaller ones)"
    )
  x, _, _ = CHUNKS[d]
  if t % 16 or (x % t and t % x):
    return f"page_size must be a multiple of 16 that divides {x}, or one of {x}, not {t}"
  return None


def block_size(num_tokens: int, num_rows: int, longest: int) -> int:
  """Most tokens in a block: of prompts no fewer than fill a wgmma, with 4 query heads per KV head."""
  size = backend.block_size(num_tokens, num_rows, longest)
  return size if longest <= backend.FEW else max(size, wgmma.ROWS // 4)


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  part: Part,
  options: Options,
  *,
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`.

  The queries are rounded to the pages' dtype.
  """
  n, num_layers, h, t, d = pages_lib.sizes(pages)
  dtype = pages.kv.dtype
  blocks, group, alone = part.blocks, q.shape[1] // h, part.block_size == 1
  g, m = blocks.first.shape[0], part.block_size * group
  x, stages, w = CHUNKS[d]
  w = min(w, -(-m // wgmma.ROWS))
  y = -(-m // (w * wgmma.ROWS))
  m8 = -(-m // 8) * 8
  queries, places = blocks_lib.queries(q, h, part)
  last = None
  if not alone:
    last = _pad(blocks_lib.per_query(blocks.last, group), y * w * wgmma.ROWS, -1)
  if m > 8:  # TMA takes 8 rows at once
    queries = _pad(queries.swapaxes(2, 3), m8, 0).swapaxes(2, 3)
  scale, softcap, sinks = options.scale, options.softcap, options.sinks
  if sinks is not None:
    sinks = _pad(jnp.tile(sinks.reshape(h, group), (1, part.block_size)), y * w * wgmma.ROWS, 0)
  if softcap is None:
    factors = jnp.stack([scale * LOG2E, jnp.float32(0)])
  else:
    factors = jnp.stack([2 * LOG2E * scale / softcap, LOG2E * softcap])
  box = min(t, x)  # positions per copy
  most = -(-tables.block_tables.shape[1] * t // x)
  z = splits.count(g * h * y, most, splits.num_sms())
  out_dtype = q.dtype if z == 1 else jnp.dtype(jnp.float32)

  out, lse = plgpu.kernel(
    functools.partial(_kernel, group=group, softcapped=softcap is not None),
    out_type=[
      jax.ShapeDtypeStruct((z, *queries.shape), out_dtype),
      jax.ShapeDtypeStruct((z, g, h, y * w, min(m8, wgmma.ROWS)), jnp.float32),
    ],
    scratch_types=[
      plgpu.SMEM((w, wgmma.ROWS, d), dtype),
      None if alone else plgpu.SMEM((w, wgmma.ROWS), jnp.int32),
      None if sinks is None else plgpu.SMEM((w, wgmma.ROWS), jnp.float32),
      plgpu.SMEM((stages, x, 2 * d), dtype),
      plgpu.SMEM((w, wgmma.ROWS, 2 * d // out_dtype.itemsize), out_dtype),
      plgpu.SMEM((w, wgmma.ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=1 + (not alone) + (sinks is not None), num_barriers=w),
      plgpu.Barrier(num_arrivals=x // box, num_barriers=stages),
      plgpu.Barrier(num_arrivals=w),
      plgpu.Barrier(num_arrivals=w, num_barriers=stages),
      plgpu.SMEM((w, wgmma.ROWS, x), dtype) if interpret else None,
    ],
    grid=(g, z, h, y),
    grid_names=("block", "split", "head", "tile"),
    num_threads=w + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret or None,
  )(
    jnp.stack([places, blocks.lengths, blocks.rows, blocks.starts, blocks.lows, blocks.highs]),
    jnp.stack([layer, options.window]), factors, queries.astype(dtype), last, sinks, tables.block_tables,
    pages.kv.reshape(n, num_layers, h, t // box, box, 2 * d),
  )  # fmt: skip
  out, lse = out[..., :m, :], lse.reshape(z, g, h, -1)[..., :m]
  out, lse = (out[0], lse[0]) if z == 1 else splits.combine(out, lse)
  out = blocks_lib.by_token(out.astype(q.dtype), part, 0)
  return out, blocks_lib.by_token(lse[..., None], part, -jnp.inf)[..., 0]


def _pad(x: jax.Array, width: int, value) -> jax.Array:
  """[...,M] with `width` columns."""
  pad = [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]
  return jnp.pad(x, pad, constant_values=value)


def _kernel(
  # inputs
  blocks_ref,  # i32[6,G] where its queries are, and of `Blocks` lengths, rows, starts, lows, highs
  numbers_ref,  # i32[2] layer, window
  factors_ref,  # f32[2]
  q_gmem,  # [G,H,M,D], or M8 in place of an M beyond 8
  last_gmem,  # i32[G,Y*W*64] position of each query, None where blocks have one token
  sinks_gmem,  # f32[H,Y*W*64] or None
  tables_ref,  # i32[S,P]
  kv_gmem,  # [N,L,H,boxes of a page,positions of a box,2D]
  # outputs
  out_gmem,  # [Z,G,H,M,D], as the queries
  lse_gmem,  # f32[Z,G,H,Y*W,M8], or 64 in place of an M8 beyond 64
  # scratch
  q_ref,  # [W,64,D]
  last_ref,  # i32[W,64] or None
  sinks_ref,  # f32[W,64] or None
  kv_ref,  # [stages,X,2D]
  out_ref,  # [W,64,D], half of D in 32 bits: there is no room for more
  lse_ref,  # f32[W,64]
  q_there,
  kv_there,
  kv_clean,
  kv_used,
  weights_ref,  # [W,64,X] for the interpreter
  *,
  group: int,  # query heads per KV head
  softcapped: bool,
):
  block, split, head, tile = map(lax.axis_index, ("block", "split", "head", "tile"))
  warpgroup = lax.axis_index("warpgroup")
  num_rows, pages_per_row = tables_ref.shape
  num_pages, _, _, boxes_per_page, box, _ = kv_gmem.shape
  num_warpgroups, _, d = q_ref.shape
  stages, x, _ = kv_ref.shape
  boxes = x // box  # of a chunk

  place, length, row, start, low, high = (blocks_ref[i, block] for i in range(6))
  layer, window = numbers_ref[0], numbers_ref[1]
  row, end = jnp.minimum(row, num_rows - 1), high + 1
  begin = jnp.maximum(start, low - window + 1)
  first_chunk, num_chunks = _share(jnp.minimum(begin, end), end, x, split, out_gmem.shape[0])
  busy = (end > 0) & (tile * num_warpgroups * wgmma.ROWS < length * group)

  def ids(number):
    """The page of each box of a chunk, N where there is none."""
    nth = [(first_chunk + number) * boxes + i for i in range(boxes)]
    columns = [jnp.minimum(lax.div(i, jnp.int32(boxes_per_page)), pages_per_row - 1) for i in nth]
    return [tables_ref[row, column] for column in columns]

  @pl.when((warpgroup == num_warpgroups) & busy)
  def _():
    if num_warpgroups == 2:
      plgpu.set_max_registers(24, action="decrease")

    @pl.loop(0, num_chunks)
    def _(number):
      slot = lax.rem(number, jnp.int32(stages))
      sources = ids(number)

      @pl.when(number >= stages)
      def _():
        plgpu.barrier_wait(kv_used.at[slot])

      part = lax.rem((first_chunk + number) * boxes, jnp.int32(boxes_per_page))
      for i, page in enumerate(sources):
        plgpu.copy_gmem_to_smem(
          kv_gmem.at[jnp.minimum(page, num_pages - 1), layer, head, part],
          kv_ref.at[slot, pl.ds(i * box, box)],
          kv_there.at[slot],
        )

  @pl.when((warpgroup < num_warpgroups) & busy)
  def _():
    if num_warpgroups == 2:
      plgpu.set_max_registers(240, action="increase")
    q, there = q_ref.at[warpgroup], q_there.at[warpgroup]
    nth = tile * num_warpgroups + warpgroup
    rows = pl.ds(nth * wgmma.ROWS, wgmma.ROWS)
    plgpu.copy_gmem_to_smem(q_gmem.at[place, head, rows], q, there)
    if last_ref is not None:
      plgpu.copy_gmem_to_smem(last_gmem.at[block, rows], last_ref.at[warpgroup], there)
    if sinks_ref is not None:
      plgpu.copy_gmem_to_smem(sinks_gmem.at[head, rows], sinks_ref.at[warpgroup], there)
    plgpu.barrier_wait(there)
    span = ()  # first and last position that each query sees, if they differ
    if last_ref is not None:
      last = wgmma.by_row(last_ref[warpgroup])
      span = wgmma.by_row(jnp.maximum(start, last - window + 1)), last

    def add_chunk(number, sums):
      slot = lax.rem(number, jnp.int32(stages))
      base = (first_chunk + number) * x
      mapped = jnp.int32(0)  # bit i: there is a page for the ith box
      for i, page in enumerate(ids(number)):
        mapped |= jnp.where(page < num_pages, jnp.int32(1 << i), jnp.int32(0))

      def live(at):
        """Which offsets into the chunk hold a token that may be seen."""
        there = lax.shift_right_logical(mapped, at >> (box.bit_length() - 1)) & 1
        return (base + at >= begin) & (base + at < end) & (there == 1)

      plgpu.barrier_wait(kv_there.at[slot])
      keys, values = (kv_ref.at[slot, :, pl.ds(i, d)] for i in (0, d))

      @pl.when((base < begin) | (base + x > end) | (mapped != (1 << boxes) - 1))
      def _():
        wgmma.clear(values, live, warpgroup, kv_clean)

      logits = wgmma.dot(q, keys.transpose((1, 0))) * factors_ref[0]
      if softcapped:  # tanh(x) = 1 - 2 / (1 + exp(2x)); the approximate tanh is too coarse
        logits = factors_ref[1] - 2 * factors_ref[1] / (1 + jnp.exp2(logits))
      at = wgmma.iota((wgmma.ROWS, x), 1)
      seen = live(at)
      if span:
        first, last = span
        seen &= (base + at >= wgmma.column(first, x)) & (base + at <= wgmma.column(last, x))
      logits = jnp.where(seen, logits, -jnp.inf)
      weights_smem = None if weights_ref is None else weights_ref.at[warpgroup]
      sums = wgmma.step(sums, logits, lambda acc, p: wgmma.add_dot(acc, p, values, weights_smem))
      plgpu.barrier_arrive(kv_used.at[slot])
      return sums

    total = wgmma.by_row(jnp.zeros(wgmma.ROWS, jnp.float32))
    top = total - jnp.inf
    if sinks_ref is not None:  # they count once
      top = wgmma.by_row(sinks_ref[warpgroup]) * LOG2E + jnp.where(split == 0, 0.0, -jnp.inf)
      total = total + jnp.where(split == 0, 1.0, 0.0)
    acc = wgmma.tiled(jnp.zeros((wgmma.ROWS, d), jnp.float32))
    sums = lax.fori_loop(0, num_chunks, add_chunk, softmax.Sums(top, total, acc))
    _store(sums, out_ref.at[warpgroup], out_gmem.at[split, place, head, rows],
           lse_ref.at[warpgroup], lse_gmem.at[split, place, head, nth])  # fmt: skip


def _store(sums: softmax.Sums, out_ref, out_gmem, lse_ref, lse_gmem) -> None:
  """Output and LSE of a warpgroup's queries; rows that there are not are clipped."""
  d, width = sums.acc.shape[1], out_ref.shape[1]
  total = jnp.where(sums.total > 0, sums.total, 1)
  made = wgmma.tiled((sums.acc / wgmma.column(total, d)).astype(out_ref.dtype))
  lse_ref[...] = wgmma.by_row(sums.top / LOG2E + jnp.log(sums.total))
  for i in range(0, d, width):
    out_ref[...] = made if width == d else lax.slice(made, (0, i), (wgmma.ROWS, i + width))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_ref, out_gmem.at[:, pl.ds(i, width)])
    plgpu.wait_smem_to_gmem(0)
  # A copy of one axis is clipped at the end of the array, not of the axis: it takes no more rows
  # than there are.
  few = lse_ref.at[pl.ds(0, lse_gmem.shape[0])]
  plgpu.copy_smem_to_gmem(few, lse_gmem)
  plgpu.wait_smem_to_gmem(0)


def _share(begin, end, x, split, num_splits) -> tuple[jax.Array, jax.Array]:
  """First chunk, and number of chunks, of a split of begin..end."""
  first = lax.div(begin, jnp.int32(x))
  count = lax.div(end + (x - 1), jnp.int32(x)) - first
  share = lax.div(count + (num_splits - 1), jnp.int32(num_splits))
  return first + split * share, jnp.clip(count - split * share, 0, share)


BACKEND = Backend(attend, refusal, block_size=block_size)
