"""Paged attention for NVIDIA Hopper (Pallas, Mosaic GPU: wgmma, TMA).

A program handles one tile of up to 128 queries of a block, for one KV head, over one split of the
pages that the tile sees. A memory warpgroup walks them in chunks of X positions and fetches each
page, keys and values together, with one TMA copy; one or two compute warpgroups of 64 queries each
follow through a ring of chunks. Partial outputs leave in float32, with their LSE, and are combined.

    # memory    chunk 0   chunk 1   wait until chunk 0 is used, chunk 2 ...
    # compute             chunk 0   chunk 1   ...

Letters as in types.py; G blocks, M queries of a block x query heads per KV head, in Y tiles of
W warpgroups x 64, Z splits, X positions of a chunk.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import softmax, splits
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Part, Tables

ROWS = 64  # of a wgmma
LOG2E = math.log2(math.e)
# head dim: (positions of a chunk, chunks in the ring, most compute warpgroups), what fits into the
# SMEM and the registers of an H200 as compiled by jax 0.12.0, November 2026; not tuned by timing
CHUNKS = {64: (128, 4, 2), 128: (64, 4, 2), 256: (64, 2, 1)}
_API = ("Barrier", "CompilerParams", "Layout", "LoweringSemantics", "SMEM", "WGMMAAccumulatorRef",
        "barrier_arrive", "barrier_wait", "broadcasted_iota", "commit_smem", "copy_gmem_to_smem",
        "kernel", "layout_cast", "set_max_registers", "wgmma")  # fmt: skip


def refusal(pages: Pages) -> str | None:
  """Why the kernel cannot serve `pages`, None if it can; without a GPU no device is judged."""
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
  if pages.kv.dtype not in (jnp.bfloat16, jnp.float16):
    return f"pages must be kept as bfloat16 or float16, not {pages.kv.dtype}: wgmma has no other"
  if d not in CHUNKS:
    return f"head_dim must be one of {', '.join(map(str, CHUNKS))}, not {d}"
  x, _, _ = CHUNKS[d]
  if t % 16 or (x % t and t % x):
    return f"page_size must be a multiple of 16 that divides {x}, or one of {x}, not {t}"
  return None


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
  blocks, group = part.blocks, q.shape[1] // h
  g, m = blocks.first.shape[0], part.block_size * group
  x, stages, w = CHUNKS[d]
  w = min(w, -(-m // ROWS))
  y = -(-m // (w * ROWS))
  spare = y * w * ROWS - m
  queries = blocks_lib.queries(q.astype(dtype), h, part)
  queries = jnp.pad(queries, ((0, 0), (0, 0), (0, spare), (0, 0)))
  last = blocks_lib.per_query(blocks.last, group)
  last = jnp.pad(last, ((0, 0), (0, spare)), constant_values=-1)
  first = jnp.maximum(blocks.starts[:, None], last - options.window + 1)
  first = jnp.where(last < 0, jnp.iinfo(jnp.int32).max, first)
  end = jnp.max(last.reshape(g, y, -1), axis=2) + 1
  begin = jnp.minimum(jnp.min(first.reshape(g, y, -1), axis=2), end)
  spans = jnp.stack([first.reshape(g, y, w, ROWS), last.reshape(g, y, w, ROWS)], axis=3)
  box = min(t, x)  # positions per copy
  most = -(-tables.block_tables.shape[1] * t // x)
  z = splits.count(g * h * y, most, splits.num_sms())
  scale, softcap = options.scale, options.softcap
  if softcap is None:
    factors = jnp.stack([scale * LOG2E, jnp.float32(0)])
  else:
    factors = jnp.stack([2 * LOG2E * scale / softcap, LOG2E * softcap])

  scratch = [
    plgpu.SMEM((w, ROWS, d), dtype),
    plgpu.SMEM((w, 2, ROWS), jnp.int32),
    plgpu.SMEM((stages, x, 2 * d), dtype),
    plgpu.Barrier(num_arrivals=2, num_barriers=w),
    plgpu.Barrier(num_arrivals=x // box, num_barriers=stages),
    plgpu.Barrier(num_arrivals=w),
    plgpu.Barrier(num_arrivals=w, num_barriers=stages),
  ]
  if interpret:
    scratch.append(plgpu.SMEM((w, ROWS, x), dtype))
  out, lse = plgpu.kernel(
    functools.partial(_kernel, softcapped=softcap is not None),
    out_type=[
      jax.ShapeDtypeStruct((z, g, h, y, w, ROWS, d), jnp.float32),
      jax.ShapeDtypeStruct((z, g, h, y, w, ROWS), jnp.float32),
    ],
    scratch_types=scratch,
    grid=(g, z, h, y),
    grid_names=("block", "split", "head", "tile"),
    num_threads=w + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret or None,
  )(
    blocks.rows, begin, end, layer[None], factors, queries.reshape(g, h, y, w, ROWS, d),
    spans, tables.block_tables, pages.kv.reshape(n, num_layers, h, t // box, box, 2 * d),
  )  # fmt: skip
  out = out.reshape(z, g, h, -1, d)[:, :, :, :m]
  lse = lse.reshape(z, g, h, -1)[:, :, :, :m]
  sinks = options.sinks
  if sinks is not None:
    sinks = jnp.tile(sinks.reshape(h, -1), (1, part.block_size))[None]
  out, lse = splits.combine(out, lse, sinks)
  out = blocks_lib.by_token(out.astype(q.dtype), part, 0)
  return out, blocks_lib.by_token(lse[..., None], part, -jnp.inf)[..., 0]


def _kernel(
  # inputs
  rows_ref,  # i32[G]
  begin_ref,  # i32[G,Y] first position that the tile sees
  end_ref,  # i32[G,Y] behind the last one
  layer_ref,  # i32[1]
  factors_ref,  # f32[2]
  q_gmem,  # [G,H,Y,W,64,D]
  spans_gmem,  # i32[G,Y,W,2,64] first and last position that each query sees
  tables_ref,  # i32[S,P]
  kv_gmem,  # [N,L,H,boxes of a page,positions of a box,2D]
  # outputs
  out_ref,  # f32[Z,G,H,Y,W,64,D]
  lse_ref,  # f32[Z,G,H,Y,W,64]
  # scratch
  q_ref,  # [W,64,D]
  spans_ref,  # i32[W,2,64]
  kv_ref,  # [stages,X,2D]
  q_there,
  kv_there,
  kv_clean,
  kv_used,
  weights_ref=None,  # [W,64,X] for the interpreter
  *,
  softcapped: bool,
):
  block, split, head, tile = map(lax.axis_index, ("block", "split", "head", "tile"))
  warpgroup = lax.axis_index("warpgroup")
  num_rows, pages_per_row = tables_ref.shape
  num_pages, _, _, boxes_per_page, box, _ = kv_gmem.shape
  num_warpgroups, _, d = q_ref.shape
  stages, x, _ = kv_ref.shape
  boxes = x // box  # of a chunk

  row = jnp.minimum(rows_ref[block], num_rows - 1)
  begin, end = begin_ref[block, tile], end_ref[block, tile]
  first_chunk, num_chunks = _share(begin, end, x, split, out_ref.shape[0])

  def ids(number):
    """The page of each box of a chunk, N where there is none."""
    nth = [(first_chunk + number) * boxes + i for i in range(boxes)]
    columns = [jnp.minimum(lax.div(i, jnp.int32(boxes_per_page)), pages_per_row - 1) for i in nth]
    return [tables_ref[row, column] for column in columns]

  @pl.when(warpgroup == num_warpgroups)
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
          kv_gmem.at[jnp.minimum(page, num_pages - 1), layer_ref[0], head, part],
          kv_ref.at[slot, pl.ds(i * box, box)],
          kv_there.at[slot],
        )

  @pl.when(warpgroup < num_warpgroups)
  def _():
    if num_warpgroups == 2:
      plgpu.set_max_registers(240, action="increase")
    q, spans, there = (ref.at[warpgroup] for ref in (q_ref, spans_ref, q_there))
    plgpu.copy_gmem_to_smem(q_gmem.at[block, head, tile, warpgroup], q, there)
    plgpu.copy_gmem_to_smem(spans_gmem.at[block, tile, warpgroup], spans, there)
    plgpu.barrier_wait(there)
    first, last = (_by_row(spans[i]) for i in (0, 1))

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
        _clear(values, live, warpgroup, kv_clean)

      logits = _dot(q, keys.transpose((1, 0))) * factors_ref[0]
      if softcapped:  # tanh(x) = 1 - 2 / (1 + exp(2x)); the approximate tanh is too coarse
        logits = factors_ref[1] - 2 * factors_ref[1] / (1 + jnp.exp2(logits))
      at = _iota((ROWS, x), 1)
      seen = live(at) & (base + at >= _column(first, x)) & (base + at <= _column(last, x))
      logits = jnp.where(seen, logits, -jnp.inf)
      weights_smem = None if weights_ref is None else weights_ref.at[warpgroup]
      sums = _step(sums, logits, lambda acc, p: _add_dot(acc, p, values, weights_smem))
      plgpu.barrier_arrive(kv_used.at[slot])
      return sums

    zeros = _by_row(jnp.zeros(ROWS, jnp.float32))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), plgpu.Layout.WGMMA)
    sums = lax.fori_loop(0, num_chunks, add_chunk, softmax.Sums(zeros - jnp.inf, zeros, acc))
    target = (split, block, head, tile, warpgroup)
    total = jnp.where(sums.total > 0, sums.total, 1)
    out_ref[target] = sums.acc / _column(total, d)
    lse_ref[target] = sums.top / LOG2E + jnp.log(sums.total)


def _share(begin, end, x, split, num_splits) -> tuple[jax.Array, jax.Array]:
  """First chunk, and number of chunks, of a split of begin..end."""
  first = lax.div(begin, jnp.int32(x))
  count = lax.div(end + (x - 1), jnp.int32(x)) - first
  share = lax.div(count + (num_splits - 1), jnp.int32(num_splits))
  return first + split * share, jnp.clip(count - split * share, 0, share)


def _clear(values_ref, live: Callable, warpgroup, clean) -> None:
  """Zeroes the values [X,D] of a chunk that are not live: 0 * NaN is NaN in a product, too."""

  @pl.when(warpgroup == 0)
  def _():
    x, d = values_ref.shape
    kept = live(_iota((x, 64), 0))
    for i in range(0, d, 64):
      ref = values_ref.at[:, pl.ds(i, 64)]
      ref[...] = jnp.where(kept, ref[...], jnp.zeros((), ref.dtype))
    plgpu.commit_smem()

  plgpu.barrier_arrive(clean)
  plgpu.barrier_wait(clean)


def _step(sums: softmax.Sums, logits: jax.Array, add: Callable) -> softmax.Sums:
  """`softmax.step` in base 2, with statistics [64]: a warpgroup holds no [64,1]."""
  top = jnp.maximum(sums.top, jnp.max(logits, axis=1))
  base = jnp.where(top == -jnp.inf, 0, top)
  weights = jnp.exp2(logits - _column(base, logits.shape[1]))
  decay = jnp.exp2(sums.top - base)
  return softmax.Sums(
    top=top,
    total=sums.total * decay + jnp.sum(weights, axis=1),
    acc=add(sums.acc * _column(decay, sums.acc.shape[1]), weights),
  )


def _dot(a_ref, b_ref) -> jax.Array:
  """a [64,K] times b [K,X]."""

  def multiply(acc_ref):
    plgpu.wgmma(acc_ref, a_ref, b_ref)
    return acc_ref[...]

  shape = (a_ref.shape[0], b_ref.shape[1])
  return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _add_dot(acc: jax.Array, weights: jax.Array, values_ref, weights_ref):
  """acc + weights [64,X] times values [X,D]."""
  weights = weights.astype(values_ref.dtype)
  if weights_ref is None:
    add = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, values_ref))
    return add(plgpu.WGMMAAccumulatorRef.init(acc))
  weights_ref[...] = weights  # the interpreter has neither run_state nor operands in registers
  return acc + _dot(weights_ref, values_ref)


def _by_row(x: jax.Array) -> jax.Array:
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def _column(x: jax.Array, width: int) -> jax.Array:
  """x [64] in each of `width` columns."""
  return lax.broadcast_in_dim(x, (x.shape[0], width), (0,))


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


BACKEND = Backend(attend, refusal)
