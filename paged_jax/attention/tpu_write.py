"""In-place writes into the page array on TPU (Pallas, Mosaic); XLA's scatter copies the pool there.

A DMA moves whole tiles, so a write is read, merge, write back, of windows of W tokens of a page.
Many windows are on their way at once, each in a slot of a ring:

    # window   0 1 2 3 4 5 6 7 8
    # read     0 1 2 3 4 5 6 ...
    # merge            0 1 2 ...        half a ring behind
    # write            0 1 2 ...        awaited when its slot is needed again
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_jax import pages as pages_lib
from paged_jax.types import Pages

RING_BYTES = 8 * 2**20
MAX_SLOTS = 32
MAX_WINDOW = 16


def write(
  pages: Pages,
  layer: jax.Array,
  k: jax.Array,
  v: jax.Array,
  slots: jax.Array,
  *,
  block_size: int,
  interpret: bool | pltpu.InterpretParams = False,
) -> Pages:
  """Writes `k`, `v` [B,H,D] of one layer at `slots` i32[B]; drops what is out of range.

  The slots are distinct, and those of one window stand side by side, as in every plan.
  `block_size`, how many of a row's tokens come together, decides how large windows are.
  """
  n, num_layers, h, t, d = pages_lib.sizes(pages)
  b, size = slots.shape[0], window_size(t, pages.kv.dtype.itemsize, block_size)
  new = pages_lib.stored(
    jnp.concatenate([k.astype(pages.dtype), v.astype(pages.dtype)], axis=-1), pages
  )
  kept = (slots >= 0) & (slots < n * t) & (layer < num_layers)
  window = jnp.where(kept, slots // size, -1)
  leads = kept & jnp.pad(window[1:] != window[:-1], (1, 0), constant_values=True)
  number = jnp.where(kept, jnp.cumsum(leads, dtype=jnp.int32) - 1, b)
  first = (
    jnp.zeros(b, jnp.int32)
    .at[jnp.where(leads, number, b)]
    .set(jnp.arange(b, dtype=jnp.int32), mode="drop")
  )
  num_tokens = jnp.zeros(b, jnp.int32).at[number].add(1, mode="drop")

  window_bytes = h * size * 2 * d * pages.kv.dtype.itemsize
  ring = max(2, min(MAX_SLOTS, RING_BYTES // (2 * window_bytes), b))
  taken = min(size, b)
  any_memory = pl.BlockSpec(memory_space=pl.ANY)
  kv = pl.pallas_call(
    _kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(1,),
      in_specs=[any_memory, any_memory],
      out_specs=any_memory,
      scratch_shapes=[
        pltpu.VMEM((ring, h, size, 2 * d), pages.kv.dtype),
        pltpu.VMEM((ring, taken, h, 2 * d), pages.kv.dtype),
        pltpu.SemaphoreType.DMA((ring,)),
        pltpu.SemaphoreType.DMA((ring,)),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(pages.kv.shape, pages.kv.dtype),
    input_output_aliases={6: 0},
    compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
    interpret=interpret,
    name="paged_write",
  )(jnp.sum(leads, dtype=jnp.int32)[None], first, num_tokens, slots, layer[None], new, pages.kv)
  return Pages(kv=kv, dtype=pages.dtype)


def window_size(page_size: int, itemsize: int, block_size: int) -> int:
  """Tokens of a window: a packed row of tiles at least, a tile where many tokens come together."""
  size = max(4 // itemsize, min(MAX_WINDOW, block_size))
  while page_size % size:
    size -= 1
  return size


def _kernel(
  # scalar prefetch
  count_ref,  # i32[1] windows
  first_ref,  # i32[B] first token of each
  num_tokens_ref,  # i32[B]
  slots_ref,  # i32[B]
  layer_ref,  # i32[1]
  # inputs
  new_hbm,  # [B,H,2D]
  kv_in,  # [N,L,H,T,2D]
  # outputs
  kv_hbm,  # the same memory
  # scratch
  windows_ref,  # [R,H,W,2D]
  tokens_ref,  # [R,W,H,2D]
  read_sems,
  write_sems,
):
  del kv_in
  count = count_ref[0]
  ring, _, size, _ = windows_ref.shape
  taken, t = tokens_ref.shape[1], kv_hbm.shape[3]
  lag = ring // 2

  def begin(i):
    """Where the tokens of window i are copied from: there are `taken` from here on."""
    return jnp.minimum(first_ref[i], new_hbm.shape[0] - taken)

  def place(i):
    slot = slots_ref[first_ref[i]]
    start = pl.multiple_of(slot % t // size * size, size)
    return kv_hbm.at[slot // t, layer_ref[0], :, pl.ds(start, size)]

  def reads(i):
    at = i % ring
    return (
      pltpu.make_async_copy(place(i), windows_ref.at[at], read_sems.at[at]),
      pltpu.make_async_copy(
        new_hbm.at[pl.ds(begin(i), taken)], tokens_ref.at[at], read_sems.at[at]
      ),
    )

  def write_back(i):
    return pltpu.make_async_copy(windows_ref.at[i % ring], place(i), write_sems.at[i % ring])

  def merge(i):
    at = i % ring

    def put(nth, window):
      token = first_ref[i] + nth
      row = jax.lax.broadcasted_iota(jnp.int32, window.shape, 1)
      new = tokens_ref[at, token - begin(i)][:, None]
      return jnp.where(row == slots_ref[token] % size, jnp.broadcast_to(new, window.shape), window)

    windows_ref[at] = jax.lax.fori_loop(0, num_tokens_ref[i], put, windows_ref[at])

  @pl.loop(0, count + lag)
  def _(i):
    @pl.when(i < count)
    def _():
      @pl.when(i >= ring)
      def _():
        write_back(i - ring).wait()

      for copy in reads(i):
        copy.start()

    @pl.when(i >= lag)
    def _():
      for copy in reads(i - lag):
        copy.wait()
      merge(i - lag)
      write_back(i - lag).start()

  @pl.loop(jnp.maximum(0, count - ring), count)
  def _(i):
    write_back(i).wait()
