"""In-place writes into the page array on TPU (Pallas, Mosaic); XLA's scatter copies the pool there.

A DMA moves whole tiles, so a write is read, merge, write back, of windows of W tokens of a page.
Many windows are on their way at once, each in a slot of a ring:

    # window   0 1 2 3 4 5 6 7 8
    # read     0 1 2 3 4 5 6 ...
    # merge            0 1 2 ...        half a ring behind
    # write            0 1 2 ...        awaited when its slot is needed again

The new tokens of a window are a run: side by side in the batch and in the page. So a merge is one
select, if the W tokens of the batch are copied that have the run where the window needs it:

    # batch          . . . . a b c . .      a b c go to rows 2 to 4 of their window
    # copied            [. . a b c .]
    # window            [0 1 2 3 4 5]  ->  [0 1 a b c 5]

A window that the run fills is not read.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_jax import pages as pages_lib
from paged_jax.types import Pages, Plan, Windows

RING_BYTES = 8 * 2**20
MIN_SLOTS = 4
MAX_SLOTS = 32
MAX_WINDOW = 64
MAX_TOKENS = 2**16  # of a kernel: three integers each fit in SMEM
TILE = 8  # rows


def windows(pages: Pages, slots: jax.Array, block_size: int) -> tuple[Windows, ...]:
  """The windows of each kernel's tokens, of all at `slots` i32[B]; see `of_kernel`."""
  pieces = range(0, slots.shape[0], MAX_TOKENS)
  return tuple(of_kernel(pages, slots[i : i + MAX_TOKENS], block_size) for i in pieces)


def of_kernel(pages: Pages, slots: jax.Array, block_size: int) -> Windows:
  """The windows of tokens at `slots` i32[B]; those out of range are not written.

  The slots are distinct, and those of one window stand side by side, as in every plan.
  `block_size`, how many of a row's tokens come together, decides how large windows are.
  """
  n, _, _, t, _ = pages_lib.sizes(pages)
  b, size = slots.shape[0], window_size(pages, block_size)
  kept = (slots >= 0) & (slots < n * t)
  follows = (slots[1:] == slots[:-1] + 1) & (slots[1:] % size != 0)
  leads = kept & ~jnp.pad(follows, (1, 0))
  run = jnp.where(kept, jnp.cumsum(leads, dtype=jnp.int32) - 1, b)
  tokens = jnp.arange(b, dtype=jnp.int32)
  first = jnp.full(b, b, jnp.int32).at[jnp.where(leads, run, b)].set(tokens, mode="drop")
  lengths = jnp.zeros(b, jnp.int32).at[run].add(1, mode="drop")
  starts = slots.at[first].get(mode="fill", fill_value=-1)
  window = starts // size
  return Windows(
    count=jnp.sum(leads, dtype=jnp.int32),
    shared=jnp.any((window[1:] == window[:-1]) & (lengths[1:] > 0)),
    first=first,
    lengths=lengths,
    slots=starts,
    size=size,
  )


def window_size(pages: Pages, block_size: int) -> int:
  """Tokens of a window, whole tiles or a part of one, at most as many as come together and fit."""
  _, _, _, t, _ = pages_lib.sizes(pages)
  fitting = RING_BYTES // (MIN_SLOTS * _slot_bytes(pages, 1))
  size = max(4 // pages.kv.dtype.itemsize, min(MAX_WINDOW, block_size, fitting))
  while t % size or (size % TILE and TILE % size):
    size -= 1
  return size


def ring_size(pages: Pages, size: int, num_tokens: int) -> int:
  """Slots of the ring: windows of `size` tokens that are on their way at once."""
  return max(2, min(MAX_SLOTS, RING_BYTES // _slot_bytes(pages, size), num_tokens))


def _slot_bytes(pages: Pages, size: int) -> int:
  """VMEM of a slot of the ring: a window, and room for twice as many tokens."""
  _, _, _, t, _ = pages_lib.sizes(pages)
  return 3 * size * (pages_lib.layer_bytes(pages) // t)


def write(
  pages: Pages,
  layer: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  plan: Plan,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> Pages:
  """Writes `k`, `v` [B,H,D] of one layer where the plan says; nothing if there is no such layer.

  `v` is None if pages hold keys only.
  """
  begin = 0
  for windows in (each for part in plan.parts for each in part.windows):
    end = begin + windows.first.shape[0]
    new_k, new_v = k[begin:end], None if v is None else v[begin:end]
    pages = write_windows(pages, layer, new_k, new_v, windows, interpret=interpret)
    begin = end
  return pages


def write_windows(
  pages: Pages,
  layer: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  windows: Windows,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> Pages:
  """Writes `k`, `v` [B,H,D] of one layer into the windows."""
  _, _, h, _, d = pages_lib.sizes(pages)
  b, size, dtype = k.shape[0], windows.size, pages.kv.dtype
  new, _ = pages_lib.stored(k, v, pages)
  ring = ring_size(pages, size, b)
  any_memory = pl.BlockSpec(memory_space=pl.ANY)
  kv = pl.pallas_call(
    _kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(1,),
      in_specs=[(any_memory,) * len(new), any_memory],
      out_specs=any_memory,
      scratch_shapes=[
        pltpu.VMEM((ring, h, size, pages.kv.shape[-1]), dtype),
        (pltpu.VMEM((ring, 2 * size, h, d), dtype),) * len(new),
        pltpu.SemaphoreType.DMA((ring,)),
        pltpu.SemaphoreType.DMA((ring,)),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(pages.kv.shape, dtype),
    input_output_aliases={6 + len(new): 0},
    compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
    interpret=interpret,
    name="paged_write",
  )(
    layer[None], windows.count[None], windows.shared.astype(jnp.int32)[None], windows.first,
    windows.lengths, windows.slots, tuple(new), pages.kv,
  )  # fmt: skip
  return dataclasses.replace(pages, kv=kv)


def _kernel(
  # scalar prefetch
  layer_ref,  # i32[1]
  count_ref,  # i32[1] runs
  shared_ref,  # i32[1] 1 if two runs are in the same window
  first_ref,  # i32[B] first token of each run
  lengths_ref,  # i32[B]
  slots_ref,  # i32[B] slot of the first token
  # inputs
  new_hbm,  # keys and values, or keys alone: [B,H,D] each
  kv_in,  # [N,L,H,T,2D]
  # outputs
  kv_hbm,  # the same memory
  # scratch
  windows_ref,  # [R,H,W,2D]
  new_refs,  # [R,2W,H,D] each
  read_sems,
  write_sems,
):
  del kv_in
  ring, _, size, _ = windows_ref.shape
  _, num_layers, _, t, _ = kv_hbm.shape
  b, _, d = new_hbm[0].shape
  taken = min(size, b)
  count = jnp.where(layer_ref[0] < num_layers, count_ref[0], 0)
  # Runs of one window go one by one: the next one reads what this one wrote.
  alone = shared_ref[0] == 1
  lag, depth = jnp.where(alone, 0, ring // 2), jnp.where(alone, 1, ring)

  def place(i):
    slot = slots_ref[i]
    start = jax.lax.rem(slot, t) - jax.lax.rem(slot, size)
    there = pl.ds(pl.multiple_of(start, size), size)
    return kv_hbm.at[jax.lax.div(slot, t), layer_ref[0], :, there]

  def source(i):
    """The first token to copy, where to, and where the window's first row then is.

    The batch may begin behind that row, or end before the window's last: there are 2W places.
    """
    row = first_ref[i] - jax.lax.rem(slots_ref[i], size)
    begin, to = jnp.clip(row, 0, b - taken), jnp.where(row < 0, size, 0)
    return begin, to, to + row - begin

  def read_tokens(i):
    at = jax.lax.rem(i, ring)
    begin, to, _ = source(i)
    return [
      pltpu.make_async_copy(
        hbm.at[pl.ds(begin, taken)], ref.at[at, pl.ds(to, taken)], read_sems.at[at]
      )
      for hbm, ref in zip(new_hbm, new_refs)
    ]

  def read_window(i):
    at = jax.lax.rem(i, ring)
    return pltpu.make_async_copy(place(i), windows_ref.at[at], read_sems.at[at])

  def write_window(i):
    at = jax.lax.rem(i, ring)
    return pltpu.make_async_copy(windows_ref.at[at], place(i), write_sems.at[at])

  def merge(i):
    at, begin = jax.lax.rem(i, ring), jax.lax.rem(slots_ref[i], size)
    _, _, first_row = source(i)
    for nth, ref in enumerate(new_refs):
      lanes = slice(nth * d, (nth + 1) * d)
      new = ref[at, pl.ds(first_row, size)].swapaxes(0, 1)
      row = jax.lax.broadcasted_iota(jnp.int32, new.shape, 1)
      live = (row >= begin) & (row < begin + lengths_ref[i])
      windows_ref[at, :, :, lanes] = jnp.where(live, new, windows_ref[at, :, :, lanes])

  @pl.loop(0, count + lag)
  def _(i):
    @pl.when(i < count)
    def _():
      @pl.when(i >= depth)
      def _():
        write_window(i - depth).wait()

      for copy in read_tokens(i):
        copy.start()

      @pl.when(lengths_ref[i] < size)
      def _():
        read_window(i).start()

    @pl.when(i >= lag)
    def _():
      for copy in read_tokens(i - lag):
        copy.wait()

      @pl.when(lengths_ref[i - lag] < size)
      def _():
        read_window(i - lag).wait()

      merge(i - lag)
      write_window(i - lag).start()

  @pl.loop(jnp.maximum(0, count - depth), count)
  def _(i):
    write_window(i).wait()
