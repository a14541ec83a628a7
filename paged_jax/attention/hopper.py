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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import softmax
from paged_jax.types import Pages, Plan, Tables

ROWS = 64  # queries of a warpgroup: what wgmma multiplies
NUM_SMS = 132
LOG2E = math.log2(math.e)


class Ring(NamedTuple):
  """The chunks in flight, and how many warpgroups share them."""

  positions: int
  stages: int
  warpgroups: int  # at most; two of head dim 256 would spill their sums to memory


# Per head dim, so that queries and chunks fit in the 227 KiB of an SM. Registers by ptxas 13.5 for
# an H200, 2026-11: up to 188, 162 and 255, none spilled. Not timed.
RINGS = {64: Ring(128, 4, 2), 128: Ring(64, 4, 2), 256: Ring(64, 2, 1)}

_Sum: Any = getattr(plgpu, "ACC", None)  # of products, in registers
_NEEDED = ("ACC", "Barrier", "Layout", "LoweringSemantics", "kernel", "layout_cast", "wgmma")


def refusal(pages: Pages, compute_capability: float | None) -> str | None:
  """Why the kernel cannot serve these pages on such a device; None if it can."""
  _, _, _, t, d = pages_lib.sizes(pages)
  if compute_capability != 9.0:
    return f"it needs compute capability 9.0, not {compute_capability}"
  if pages.dtype not in (jnp.bfloat16, jnp.float16):
    return f"its products (wgmma) are of 16-bit floats, not {pages.dtype}"
  if pages.kv.dtype != pages.dtype:
    return f"it reads pages stored as {pages.dtype}, not {pages.kv.dtype}"
  if d not in RINGS:
    return f"it knows head dims {', '.join(map(str, RINGS))}, not {d}"
  x = RINGS[d].positions
  if t % 16 or (x % t and t % x):
    return f"it needs pages of 16, 32, 64 or a multiple of {x} tokens, not {t}"
  if missing := [name for name in _NEEDED if not hasattr(plgpu, name)]:
    return f"this jax's Mosaic GPU has no {', '.join(missing)}"
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
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  n, num_layers, h, t, d = pages_lib.sizes(pages)
  blocks = blocks_lib.make(q, h, tables, plan, window)
  g, _, m, _ = blocks.queries.shape
  x, stages, w = RINGS[d]
  w = min(w, -(-m // ROWS))
  y = -(-m // (w * ROWS))
  spare = y * w * ROWS - m
  queries = jnp.pad(blocks.queries.astype(pages.dtype), ((0, 0), (0, 0), (0, spare), (0, 0)))
  first = jnp.pad(blocks.first, ((0, 0), (0, spare)), constant_values=jnp.iinfo(jnp.int32).max)
  last = jnp.pad(blocks.last, ((0, 0), (0, spare)), constant_values=-1)
  end = jnp.max(last.reshape(g, y, -1), axis=2) + 1
  end = jnp.where(layer < num_layers, end, 0)
  begin = jnp.minimum(jnp.min(first.reshape(g, y, -1), axis=2), end)
  z = splits(g * h * y, -(-tables.block_tables.shape[1] * t // x))
  if softcap is None:
    factors = jnp.stack([scale * LOG2E, jnp.float32(0)])
  else:
    factors = jnp.stack([2 * LOG2E * scale / softcap, LOG2E * softcap])

  scratch = [
    plgpu.SMEM((w, ROWS, d), pages.dtype),
    plgpu.SMEM((w, ROWS), jnp.int32),
    plgpu.SMEM((w, ROWS), jnp.int32),
    plgpu.SMEM((stages, x, 2 * d), pages.dtype),
    plgpu.Barrier(num_arrivals=3, num_barriers=w),
    plgpu.Barrier(num_arrivals=max(1, x // t), num_barriers=stages),
    plgpu.Barrier(num_arrivals=w),
    plgpu.Barrier(num_arrivals=w, num_barriers=stages),
  ]
  if interpret:
    scratch.append(plgpu.SMEM((w, ROWS, x), pages.dtype))
  out, lse = plgpu.kernel(
    functools.partial(_kernel, shape=(n, num_layers, h, t), softcapped=softcap is not None),
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
    first.reshape(g, y, w, ROWS), last.reshape(g, y, w, ROWS), tables.block_tables,
    pages.kv.reshape(-1, min(t, x), 2 * d),
  )  # fmt: skip
  out = out.reshape(z, g, h, -1, d)[:, :, :, :m]
  lse = lse.reshape(z, g, h, -1, 1)[:, :, :, :m]
  return blocks_lib.by_token(q, blocks, *combine(out, lse, sinks))


def _kernel(
  # inputs
  rows_ref,  # i32[G]
  begin_ref,  # i32[G,Y] first position that the tile sees
  end_ref,  # i32[G,Y] behind the last one
  layer_ref,  # i32[1]
  factors_ref,  # f32[2]
  q_gmem,  # [G,H,Y,W,64,D]
  first_gmem,  # i32[G,Y,W,64]
  last_gmem,  # i32[G,Y,W,64]
  tables_ref,  # i32[S,P]
  kv_gmem,  # [N*L*H*(T/X),X,2D], or [N*L*H,T,2D] if pages are shorter than chunks
  # outputs
  out_ref,  # f32[Z,G,H,Y,W,64,D]
  lse_ref,  # f32[Z,G,H,Y,W,64]
  # scratch
  q_ref,  # [W,64,D]
  first_ref,  # i32[W,64]
  last_ref,  # i32[W,64]
  kv_ref,  # [stages,X,2D]
  q_there,
  kv_there,
  kv_clean,
  kv_used,
  weights_ref=None,  # [W,64,X] for the interpreter
  *,
  shape: tuple[int, int, int, int],
  softcapped: bool,
):
  block, split, head, tile = map(lax.axis_index, ("block", "split", "head", "tile"))
  warpgroup = lax.axis_index("warpgroup")
  num_rows, pages_per_row = tables_ref.shape
  num_pages, num_layers, num_heads, t = shape
  stages, x, width = kv_ref.shape
  num_warpgroups, d, box = q_ref.shape[0], width // 2, kv_gmem.shape[1]

  row = jnp.minimum(rows_ref[block], num_rows - 1)
  begin, end = begin_ref[block, tile], end_ref[block, tile]
  first_chunk, num_chunks = _share(begin, end, x, split, out_ref.shape[0])

  def page(number, i):
    """Id of a chunk's ith page, N where there is none."""
    column = lax.div((first_chunk + number) * x, jnp.int32(t)) + i
    return tables_ref[row, jnp.minimum(column, pages_per_row - 1)]

  @pl.when(warpgroup == num_warpgroups)
  def _():
    @pl.loop(0, num_chunks)
    def _(number):
      slot = lax.rem(number, jnp.int32(stages))

      @pl.when(number >= stages)
      def _():
        plgpu.barrier_wait(kv_used.at[slot])

      part = lax.rem(first_chunk + number, jnp.int32(t // box))  # of a page longer than a chunk
      for i in range(x // box):
        source = jnp.minimum(page(number, i), num_pages - 1) * num_layers + layer_ref[0]
        plgpu.copy_gmem_to_smem(
          kv_gmem.at[(source * num_heads + head) * (t // box) + part],
          kv_ref.at[slot, pl.ds(i * box, box)],
          kv_there.at[slot],
        )

  @pl.when(warpgroup < num_warpgroups)
  def _():
    for source, target in (
      (q_gmem.at[block, head, tile, warpgroup], q_ref.at[warpgroup]),
      (first_gmem.at[block, tile, warpgroup], first_ref.at[warpgroup]),
      (last_gmem.at[block, tile, warpgroup], last_ref.at[warpgroup]),
    ):
      plgpu.copy_gmem_to_smem(source, target, q_there.at[warpgroup])
    plgpu.barrier_wait(q_there.at[warpgroup])
    first, last = (_by_row(ref[warpgroup]) for ref in (first_ref, last_ref))

    def add_chunk(number, sums):
      slot = lax.rem(number, jnp.int32(stages))
      base = (first_chunk + number) * x
      mapped = jnp.int32(0)  # bit i: there is an ith page
      for i in range(x // box):
        mapped |= jnp.where(page(number, i) < num_pages, jnp.int32(1 << i), jnp.int32(0))

      def exists(at):
        """Which offsets into the chunk lie on a page."""
        return (mapped >> (at >> (box.bit_length() - 1))) & 1 == 1

      plgpu.barrier_wait(kv_there.at[slot])
      keys, values = (kv_ref.at[slot, :, pl.ds(i, d)] for i in (0, d))

      @pl.when((base < begin) | (base + x > end) | (mapped != (1 << x // box) - 1))
      def _():  # 0 * NaN is NaN: nothing stale may be multiplied
        @pl.when(warpgroup == 0)
        def _():
          at = _iota((x, 64), 0)
          live = exists(at) & (at >= begin - base) & (at < end - base)
          for i in range(d, 2 * d, 64):
            ref = kv_ref.at[slot, :, pl.ds(i, 64)]
            ref[...] = jnp.where(live, ref[...], jnp.zeros((), kv_ref.dtype))
          plgpu.commit_smem()

        plgpu.barrier_arrive(kv_clean)
        plgpu.barrier_wait(kv_clean)

      logits = _dot(q_ref.at[warpgroup], keys.transpose((1, 0))) * factors_ref[0]
      if softcapped:  # tanh(x) = 1 - 2 / (1 + exp(2x)); the approximate tanh is too coarse
        logits = factors_ref[1] - 2 * factors_ref[1] / (1 + jnp.exp2(logits))
      at = _iota((ROWS, x), 1)
      seen = exists(at) & (at >= _column(first - base, x)) & (at <= _column(last - base, x))
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

  return pl.run_scoped(multiply, _Sum((a_ref.shape[0], b_ref.shape[1]), jnp.float32))


def _add_dot(acc: jax.Array, weights: jax.Array, values_ref, weights_ref) -> jax.Array:
  """acc + weights [64,X] times values [X,D]."""
  weights = weights.astype(values_ref.dtype)
  if weights_ref is None:
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, values_ref))(_Sum.init(acc))
  weights_ref[...] = weights  # the interpreter has neither run_state nor operands in registers
  return acc + _dot(weights_ref, values_ref)


def _by_row(x: jax.Array) -> jax.Array:
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def _column(x: jax.Array, width: int) -> jax.Array:
  """x [64] in each of `width` columns."""
  return lax.broadcast_in_dim(x, (x.shape[0], width), (0,))


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def combine(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Attention over all splits, out [Z,G,H,M,D] and lse [Z,G,H,M,1], and the sinks."""
  total = jax.nn.logsumexp(lse, axis=0)
  if sinks is not None:
    by_head = sinks.reshape(lse.shape[2], 1, -1)
    tops = jnp.tile(by_head, (1, lse.shape[3] // by_head.shape[2], 1)).reshape(1, *lse.shape[2:])
    total = jnp.logaddexp(total, tops)
  weights = jnp.exp(lse - jnp.where(total == -jnp.inf, 0, total)[None])
  return jnp.einsum("zghmd,zghmi->ghmd", out, weights), total


def splits(programs: int, most: int) -> int:
  """The smallest number of splits that fills the last wave of programs nearly as well as any."""
  if programs >= 0.8 * NUM_SMS:
    return 1
  counts = range(1, min(most, NUM_SMS) + 1)
  filled = [n * programs / NUM_SMS / -(-n * programs // NUM_SMS) for n in counts]
  return next(n for n, part in zip(counts, filled) if part >= 0.85 * max(filled))
