"""Paged attention for TPU (Pallas, Mosaic).

A program handles one block of queries, of one row. It walks the pages that the block sees in
chunks of C pages; while one chunk is computed the next one is fetched, also when it is the first
one of the next block. The row of the block table is fetched, too, one block ahead, so that no
table has to fit in SMEM whole.

    # block    g                                   g+1
    # fetch    chunk 1   chunk 2   chunk 0 of g+1  ...      ids of g+2
    # compute  chunk 0   chunk 1   chunk 2         chunk 0  ...

Letters as in types.py; G blocks, M queries of a block x query heads per KV head, C pages per chunk,
X = C*T positions of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import softmax, tpu_write
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Plan, Tables

CHUNK_TOKENS = 512
VMEM_BYTES = 64 * 2**20


def refusal(pages: Pages) -> str | None:
  """Why the kernel cannot serve `pages`, None if it can."""
  _, _, _, t, d = pages_lib.sizes(pages)
  if pages.kv.dtype not in (jnp.float32, jnp.bfloat16):
    return f"pages must be kept as float32 or bfloat16, not {pages.kv.dtype}"
  rows = 32 // pages.kv.dtype.itemsize  # of a tile
  if t % rows:
    return f"page_size must be a multiple of {rows} for {pages.kv.dtype}, not {t}"
  if d % 64:
    return f"head_dim must be a multiple of 64, not {d}"
  return None


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  plan: Plan,
  options: Options,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  _, num_layers, h, t, d = pages_lib.sizes(pages)
  blocks = blocks_lib.make(q, h, tables, plan, options.window)
  g, _, m, _ = blocks.queries.shape
  begin, end = jnp.min(blocks.first, axis=1), jnp.max(blocks.last, axis=1) + 1
  end = jnp.where(layer < num_layers, end, 0)
  begin, end = jnp.pad(begin, (0, 1)), jnp.pad(end, (0, 1))  # nothing to fetch behind the last
  queries, width = blocks.queries, d
  if d % 128:  # keys and values lie side by side in the lanes: take both, and let zeros drop one
    queries, width = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, d))), 2 * d
  fitting = VMEM_BYTES // (
    4 * 2 * h * t * d * pages.kv.dtype.itemsize
  )  # two chunks, half the space
  c = max(1, min(CHUNK_TOKENS // t, fitting, tables.block_tables.shape[1]))
  sums = blocks_lib.start(queries[0, ..., :1], options.sinks)
  softcap = options.softcap
  scalars = jnp.stack([options.scale, jnp.float32(0) if softcap is None else softcap])

  def block(*shape):
    return pl.BlockSpec((1, *shape), lambda i, *_: (i, *[0] * len(shape)))

  def whole(*shape):
    return pl.BlockSpec(shape, lambda i, *_: (0,) * len(shape))

  any_memory = pl.BlockSpec(memory_space=pl.ANY)
  out, lse = pl.pallas_call(
    functools.partial(_kernel, size=d, softcapped=softcap is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(g,),
      in_specs=[
        pl.BlockSpec(memory_space=pltpu.SMEM),
        block(h, m, width),
        block(m, 2),
        whole(h, m, 1),
        whole(h, m, 1),
        any_memory,
        any_memory,
      ],
      out_specs=[block(h, m, d), block(m, h)],
      scratch_shapes=[
        pltpu.SMEM((2, tables.block_tables.shape[1]), jnp.int32),
        pltpu.VMEM((2, c, h, t, 2 * d), pages.kv.dtype),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((g, h, m, d), q.dtype),
      jax.ShapeDtypeStruct((g, m, h), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",),
      vmem_limit_bytes=VMEM_BYTES,
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name="paged_attention",
  )(
    blocks.rows, begin, end, layer[None], scalars, queries,
    jnp.stack([blocks.first, blocks.last], axis=-1), sums.top, sums.total, tables.block_tables, pages.kv,
  )  # fmt: skip
  return blocks_lib.by_token(q, blocks, out, lse.swapaxes(1, 2)[..., None])


def write(
  pages: Pages,
  layer: jax.Array,
  k: jax.Array,
  v: jax.Array,
  plan: Plan,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> Pages:
  """Writes k and v [B,H,D] in place; XLA's scatter copies the pool on TPU."""
  return tpu_write.write(
    pages, layer, k, v, plan.slots, block_size=plan.block_size, interpret=interpret
  )


def _kernel(
  # scalar prefetch
  rows_ref,  # i32[G]
  begin_ref,  # i32[G+1] first position that the block sees
  end_ref,  # i32[G+1] behind the last one
  layer_ref,  # i32[1]
  # inputs
  scalars_ref,  # f32[2] scale, softcap
  q_ref,  # [1,H,M,D]
  seen_ref,  # i32[1,M,2] first and last position that each query sees
  top_ref,  # f32[H,M,1]
  total_ref,  # f32[H,M,1]
  tables_hbm,  # i32[S,P]
  kv_hbm,  # [N,L,H,T,2D]
  # outputs
  out_ref,  # [1,H,M,D]
  lse_ref,  # f32[1,M,H]
  # scratch
  ids_ref,  # i32[2,P] in SMEM
  kv_ref,  # [2,C,H,T,2D]
  turn_ref,  # i32[1] in SMEM: chunks so far
  ids_sems,
  kv_sems,
  *,
  size: int,
  softcapped: bool,
):
  g, num_blocks = pl.program_id(0), pl.num_programs(0)
  num_pages = kv_hbm.shape[0]
  _, c, h, t, _ = kv_ref.shape
  chunk = c * t

  def span(block):
    """First logical page, and number of pages, that a block sees."""
    first = begin_ref[block] // t
    return first, jnp.maximum(pl.cdiv(end_ref[block], t) - first, 0)

  first_page, count = span(g)
  begin, end = begin_ref[g], end_ref[g]
  num_chunks = pl.cdiv(count, c)

  def fetch_ids(block):
    row = jnp.minimum(rows_ref[block], tables_hbm.shape[0] - 1)
    return pltpu.make_async_copy(tables_hbm.at[row], ids_ref.at[block % 2], ids_sems.at[block % 2])

  def fetch(block, number, slot, *, unroll: bool):
    """Starts the copies of a chunk's pages, of none behind the last block."""
    first, count = span(block)

    @pl.loop(0, c, unroll=unroll)
    def _(i):
      @pl.when(number * c + i < count)
      def _():
        page = jnp.minimum(ids_ref[block % 2, first + number * c + i], num_pages - 1)
        there = kv_hbm.at[page, layer_ref[0]]
        pltpu.make_async_copy(there, kv_ref.at[slot, i], kv_sems.at[slot]).start()

  def arrive(number, slot):
    """Waits for them; for a full chunk at once."""
    live = jnp.minimum(count - number * c, c)

    @pl.when(live == c)
    def _():
      _wait(kv_ref.at[slot], kv_sems.at[slot])

    @pl.loop(0, jnp.where(live == c, 0, live))
    def _(i):
      _wait(kv_ref.at[slot, i], kv_sems.at[slot])

  def clear(base, slot):
    """Zeroes values outside begin..end: 0 * NaN is NaN, so nothing stale may be multiplied."""
    zero_from = 0 if size % 128 else size

    @pl.loop(0, c)
    def _(i):
      first = base + i * t

      @pl.when((first < begin) | (first + t > end))
      def _():
        values = kv_ref[slot, i, :, :, zero_from:]
        at = first + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
        live = (at >= begin) & (at < end)
        kv_ref[slot, i, :, :, zero_from:] = jnp.where(live, values, jnp.zeros_like(values))

  @pl.when(g == 0)
  def _():
    turn_ref[0] = 0
    fetch_ids(0).start()
    fetch_ids(0).wait()
    fetch(0, 0, 0, unroll=False)

  @pl.when(g + 1 < num_blocks)
  def _():
    fetch_ids(g + 1).start()

  turn = turn_ref[0]

  @pl.when((num_chunks == 0) & (g + 1 < num_blocks))
  def _():
    fetch_ids(g + 1).wait()
    fetch(g + 1, 0, turn % 2, unroll=False)

  def add_chunk(number, sums):
    slot = (turn + number) % 2
    last = number + 1 == num_chunks

    @pl.when(last & (g + 1 < num_blocks))
    def _():
      fetch_ids(g + 1).wait()

    fetch(jnp.where(last, g + 1, g), jnp.where(last, 0, number + 1), 1 - slot, unroll=True)
    arrive(number, slot)
    base = first_page * t + number * chunk

    @pl.when((base < begin) | (base + chunk > end))
    def _():
      clear(base, slot)

    at = base + jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[2], chunk), 1)
    seen = (at >= seen_ref[0, :, :1]) & (at <= seen_ref[0, :, 1:])

    def keys_and_values(head):
      kv = kv_ref[slot, :, head].reshape(chunk, 2 * size)
      k, v = (kv, kv) if size % 128 else (kv[:, :size], kv[:, size:])
      return (k, v) if k.dtype == q_ref.dtype else (k.astype(jnp.float32), v.astype(jnp.float32))

    def logits(head):
      k, _ = keys_and_values(head)
      softcap = scalars_ref[1] if softcapped else None
      return softmax.logits(q_ref[0, head].astype(k.dtype), k, seen, scalars_ref[0], softcap)

    # all logits first: one head's softmax then overlaps with another's products
    found = [logits(i) for i in range(h)]
    return tuple(softmax.step(sums[i], found[i], keys_and_values(i)[1]) for i in range(h))

  zeros = jnp.zeros((q_ref.shape[2], q_ref.shape[3]), jnp.float32)
  start = tuple(softmax.Sums(top_ref[i], total_ref[i], zeros) for i in range(h))
  sums = jax.lax.fori_loop(0, num_chunks, add_chunk, start)
  turn_ref[0] = turn + num_chunks
  for i in range(h):
    out, lse = softmax.finish(sums[i])
    out_ref[0, i] = out[:, -size:].astype(out_ref.dtype)
    lse_ref[0, :, i : i + 1] = lse


def _wait(there, sem):
  """Waits until as many bytes as `there` has are in."""
  pltpu.make_async_copy(there, there, sem).wait()


BACKEND = Backend(attend, refusal, write)
