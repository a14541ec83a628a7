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
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import softmax, tpu_write
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Part, Plan, Tables

CHUNK_TOKENS = 512
VMEM_BYTES = 64 * 2**20
LANES = 128
LN2 = math.log(2)
SMALL = 64  # queries of a block whose logits of all heads are found first


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
  part: Part,
  options: Options,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  _, _, h, t, d = pages_lib.sizes(pages)
  b, num_heads, _ = q.shape
  group, alone = num_heads // h, part.block_size == 1
  blocks, m = part.blocks, part.block_size * group
  if alone:  # a token is where its block is: nothing to arrange
    queries, places = q.reshape(b, h, group, d), jnp.minimum(blocks.first, b - 1)
  else:
    queries, places = blocks_lib.queries(q, h, part), jnp.arange(blocks.first.shape[0])
  width = d
  if d % 128:  # keys and values lie side by side in the lanes: take both, and let zeros drop one
    queries, width = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, d))), 2 * d
  last = None if alone else blocks_lib.per_query(blocks.last, group)[..., None]
  sinks = options.sinks
  if sinks is not None:
    sinks = jnp.tile(sinks.reshape(h, group) / LN2, (1, part.block_size))[..., None]
    sinks = jnp.broadcast_to(sinks, (h, m, LANES))
  page_bytes = 2 * h * t * d * pages.kv.dtype.itemsize
  fitting = VMEM_BYTES // (4 * page_bytes)  # two chunks, half the space
  c = max(1, min(CHUNK_TOKENS // t, fitting, tables.block_tables.shape[1]))
  # Logits are in base 2, as the processor has it: exp would multiply each of them once more.
  if options.softcap is None:
    factors = jnp.stack([options.scale / LN2, jnp.float32(0)])
  else:
    factors = jnp.stack([options.scale / options.softcap, options.softcap / LN2])

  def block(*shape):
    return pl.BlockSpec((1, *shape), lambda i, places, *_: (places[i], *[0] * len(shape)))

  def whole(*shape):
    return pl.BlockSpec(shape, lambda i, *_: (0,) * len(shape))

  any_memory = pl.BlockSpec(memory_space=pl.ANY)
  scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
  out, lse = pl.pallas_call(
    functools.partial(_kernel, size=d, softcapped=options.softcap is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=7,
      grid=(jnp.maximum(blocks.count, 1),),  # of no block: the first one sees nothing
      in_specs=[
        scalar,
        block(h, m, width),
        None if alone else block(m, 1),
        None if sinks is None else whole(h, m, LANES),
        any_memory,
        any_memory,
      ],
      out_specs=[block(h, m, d), block(m, h) if options.lse else None],
      scratch_shapes=[
        pltpu.SMEM((2, tables.block_tables.shape[1]), jnp.int32),
        pltpu.VMEM((2, c, h, t, 2 * d), pages.kv.dtype),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((queries.shape[0], h, m, d), q.dtype),
      jax.ShapeDtypeStruct((queries.shape[0], m, h), jnp.float32) if options.lse else None,
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",),
      vmem_limit_bytes=VMEM_BYTES,
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name="paged_attention",
  )(
    places, blocks.rows, blocks.starts, blocks.lows, blocks.highs, layer[None], options.window[None],
    factors, queries, last, sinks, tables.block_tables, pages.kv,
  )  # fmt: skip

  def by_token(x, missing):
    if alone:  # what attends to nothing was not written
      return jnp.where(part.last[:, None, None] >= 0, x.reshape(b, num_heads, -1), missing)
    return blocks_lib.by_token(x, part, missing)

  if lse is not None:
    lse = by_token(lse.swapaxes(1, 2)[..., None], -jnp.inf)[..., 0]
  return by_token(out, 0), lse


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
  begin = 0
  for part in plan.parts:
    new = (x[begin : (end := begin + part.rows.shape[0])] for x in (k, v))
    pages = tpu_write.write(pages, layer, *new, part.windows, interpret=interpret)
    begin = end
  return pages


def _kernel(
  # scalar prefetch
  places_ref,  # i32[G] where its queries are
  rows_ref,  # i32[G]
  starts_ref,  # i32[G]
  lows_ref,  # i32[G]
  highs_ref,  # i32[G]
  layer_ref,  # i32[1]
  window_ref,  # i32[1]
  # inputs
  factors_ref,  # f32[2] of the logits, and of their tanh
  q_ref,  # [1,H,M,D]
  last_ref,  # i32[1,M,1], None where blocks have one token
  sinks_ref,  # f32[H,M,128] or None
  tables_hbm,  # i32[S,P]
  kv_hbm,  # [N,L,H,T,2D]
  # outputs
  out_ref,  # [1,H,M,D]
  lse_ref,  # f32[1,M,H] or None
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
  del places_ref
  g, num_blocks = pl.program_id(0), pl.num_programs(0)
  num_pages = kv_hbm.shape[0]
  _, c, h, t, _ = kv_ref.shape
  chunk, m = c * t, q_ref.shape[2]

  def span(block):
    """First position that a block sees, the one behind its last, first logical page, and pages; no
    pages behind the last block."""
    at = jnp.minimum(block, num_blocks - 1)
    begin = jnp.maximum(starts_ref[at], lows_ref[at] - window_ref[0] + 1)
    end = highs_ref[at] + 1
    first = begin // t
    return begin, end, first, jnp.where(block < num_blocks, pl.cdiv(end, t) - first, 0)

  begin, end, first_page, count = span(g)
  num_chunks = pl.cdiv(jnp.maximum(count, 0), c)

  def fetch_ids(block):
    row = jnp.minimum(rows_ref[block], tables_hbm.shape[0] - 1)
    return pltpu.make_async_copy(tables_hbm.at[row], ids_ref.at[block % 2], ids_sems.at[block % 2])

  def fetch(block, number, slot, *, unroll: bool):
    """Starts the copies of a chunk's pages."""
    _, _, first, count = span(block)

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
    final = number + 1 == num_chunks

    @pl.when(final & (g + 1 < num_blocks))
    def _():
      fetch_ids(g + 1).wait()

    fetch(jnp.where(final, g + 1, g), jnp.where(final, 0, number + 1), 1 - slot, unroll=True)
    arrive(number, slot)
    base = first_page * t + number * chunk

    @pl.when((base < begin) | (base + chunk > end))
    def _():
      clear(base, slot)

    at = base + jax.lax.broadcasted_iota(jnp.int32, (m, chunk), 1)
    if last_ref is None:
      seen = (at >= begin) & (at < end)
    else:
      last = last_ref[0]
      seen = (at >= jnp.maximum(starts_ref[g], last - window_ref[0] + 1)) & (at <= last)

    def keys_and_values(head):
      kv = kv_ref[slot, :, head].reshape(chunk, 2 * size)
      k, v = (kv, kv) if size % 128 else (kv[:, :size], kv[:, size:])
      return (k, v) if k.dtype == q_ref.dtype else (k.astype(jnp.float32), v.astype(jnp.float32))

    def logits(head):
      k, _ = keys_and_values(head)
      found = softmax.product(q_ref[0, head].astype(k.dtype), k) * factors_ref[0]
      found = factors_ref[1] * jnp.tanh(found) if softcapped else found
      return jnp.where(seen, found, -jnp.inf)

    # One head's softmax overlaps with the products of those ahead: all of them if they are small.
    ahead = h if m <= SMALL else 1
    found, made = [logits(i) for i in range(ahead)], []
    for i in range(h):
      found += [logits(i + ahead)] if i + ahead < h else []
      made.append(softmax.step(sums[i], found[i], keys_and_values(i)[1], jnp.exp2))
    return tuple(made)

  lanes = LANES if chunk % LANES == 0 and q_ref.shape[3] % LANES == 0 else 1
  one = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (m, lanes), 1) == 0, 1.0, 0.0)

  def start(head):
    """Nothing seen, or the sinks alone."""
    acc = jnp.zeros((m, q_ref.shape[3]), jnp.float32)
    if sinks_ref is None:
      return softmax.Sums(jnp.full((m, lanes), -jnp.inf), jnp.zeros((m, lanes)), acc)
    return softmax.Sums(sinks_ref[head, :, :lanes], one, acc)

  sums = jax.lax.fori_loop(0, num_chunks, add_chunk, tuple(start(i) for i in range(h)))
  turn_ref[0] = turn + num_chunks
  for i in range(h):
    out, lse = softmax.finish(sums[i], LN2)
    out_ref[0, i] = out[:, -size:].astype(out_ref.dtype)
    if lse_ref is not None:
      lse_ref[0, :, i : i + 1] = lse[:, :1]


def _wait(there, sem):
  """Waits until as many bytes as `there` has are in."""
  pltpu.make_async_copy(there, there, sem).wait()


BACKEND = Backend(attend, refusal, write, windows=tpu_write.windows)
