"""Paged attention for TPU (Pallas, Mosaic).

The kernel is in `tpu_kernel.py`, the writes are in `tpu_write.py`.

Letters as in types.py; G blocks, M queries of a block x query heads per KV head, C pages per chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import tpu_kernel, tpu_limits, tpu_write
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.attention.tpu_kernel import LANES, LN2
from paged_jax.types import Pages, Part, Tables

CHUNK_TOKENS = 512
# Of rows that decode where keys contain values: one KV head leaves nothing to overlap with, so long
# chunks are worth 17% (128 query heads, v6e).
SHARED_CHUNK_TOKENS = 1024


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  part: Part,
  options: Options,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  _, _, h, t, d = pages_lib.sizes(pages)
  group, alone = q.shape[1] // h, part.block_size == 1
  blocks, m = part.blocks, part.block_size * group
  queries, places = blocks_lib.queries(q, h, part)
  values, out_size = (d, 2 * d), d  # lanes of a token's value
  if pages.value_dim is not None:
    out_size = min(d, -(-pages.value_dim // LANES) * LANES)
    values = 0, out_size
  elif d % LANES:  # keys and values lie side by side in the lanes: take both, let zeros drop one
    queries, values = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, d))), (0, 2 * d)
  last = None if alone else blocks_lib.per_query(blocks.last, group)[..., None]
  sinks = options.sinks
  if sinks is not None:
    sinks = jnp.tile(sinks.reshape(h, group) / LN2, (1, part.block_size))[..., None]
    sinks = jnp.broadcast_to(sinks, (h, m, LANES))
  arrays = jax.tree.leaves(pages)  # numbers, and of 8-bit pages scales
  fitting = tpu_limits.vmem_bytes() // (4 * pages_lib.layer_bytes(pages))  # two chunks, half of it
  chunk_tokens = SHARED_CHUNK_TOKENS if alone and pages.value_dim is not None else CHUNK_TOKENS
  c = max(1, min(chunk_tokens // t, fitting, tables.block_tables.shape[1]))
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
    functools.partial(tpu_kernel.kernel, values=values, softcapped=options.softcap is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(jnp.maximum(blocks.num_blocks, 1),),  # of no block: the first one sees nothing
      in_specs=[
        scalar,
        block(h, m, queries.shape[3]),
        None if alone else block(m, 1),
        None if sinks is None else whole(h, m, LANES),
        any_memory,
        [any_memory] * len(arrays),
      ],
      out_specs=[block(h, m, out_size), block(m, h) if options.lse else None],
      scratch_shapes=[
        pltpu.SMEM((2, tables.block_tables.shape[1]), jnp.int32),
        [pltpu.VMEM((2, c, *x.shape[2:]), x.dtype) for x in arrays],
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((queries.shape[0], h, m, out_size), q.dtype),
      jax.ShapeDtypeStruct((queries.shape[0], m, h), jnp.float32) if options.lse else None,
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",),
      vmem_limit_bytes=tpu_limits.vmem_bytes(),
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name="paged_attention",
  )(
    places, blocks.rows, blocks.starts, blocks.lows, blocks.highs,
    jnp.stack([layer, options.window]), factors, queries, last, sinks, tables.block_tables, arrays,
  )  # fmt: skip

  if lse is not None:
    lse = blocks_lib.by_token(lse.swapaxes(1, 2)[..., None], part, -jnp.inf)[..., 0]
  return blocks_lib.by_token(out, part, 0), lse


BACKEND = Backend(
  attend, tpu_limits.refusal, tpu_write.write, tpu_limits.block_size, tpu_write.windows
)
