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

Scales are written by the same loop, with windows of their own: 128 tokens, a row of lanes. Two
windows of numbers may share such a row, so each array needs runs of its own.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_jax import pages as pages_lib
from paged_jax.attention.tpu_kernel import LANES
from paged_jax.types import Pages, Plan, Windows

RING_BYTES = 8 * 2**20
MIN_SLOTS = 4
MAX_SLOTS = 32
MAX_WINDOW = 64
MAX_TOKENS = 2**16  # of a kernel: three integers each fit in SMEM
TILE = 8  # rows


def windows(pages: Pages, slots: jax.Array, block_size: int) -> tuple[Windows, ...]:
  """The windows of each kernel, for all tokens at `slots` i32[B]; see `of_kernel`.

  `block_size`, how many of a row's tokens come together, decides how large windows are. With scales,
  each kernel that writes numbers is followed by one that writes their scales.
  """
  sizes = [window_size(pages, block_size)] + [LANES] * (pages.scales is not None)
  pieces = range(0, slots.shape[0], MAX_TOKENS)
  return tuple(of_kernel(pages, slots[i : i + MAX_TOKENS], size) for i in pieces for size in sizes)


def of_kernel(pages: Pages, slots: jax.Array, size: int) -> Windows:
  """The windows, of `size` tokens, of those at `slots` i32[B]; slots out of range are not written.

  The slots are distinct, and those of one window stand side by side, as in every plan.
  """
  n, _, _, t, _ = pages_lib.sizes(pages)
  b = slots.shape[0]
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
  fitting = RING_BYTES // (MIN_SLOTS * _slot_bytes(pages.kv, 1))
  size = max(4 // pages.kv.dtype.itemsize, min(MAX_WINDOW, block_size, fitting))
  while t % size or (size % TILE and TILE % size):
    size -= 1
  return size


def ring_size(array: jax.Array, size: int, num_tokens: int) -> int:
  """Slots of the ring: windows of `size` tokens of `array` that are on their way at once."""
  return max(2, min(MAX_SLOTS, RING_BYTES // _slot_bytes(array, size), num_tokens))


def _slot_bytes(array: jax.Array, size: int) -> int:
  """VMEM of a slot of the ring: a window, and room for twice as many tokens."""
  _, _, h, _, *width = array.shape
  return 3 * size * h * math.prod(width) * array.dtype.itemsize


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
  begin, windows = 0, iter([each for part in plan.parts for each in part.windows])
  for numbers in windows:
    end = begin + numbers.first.shape[0]
    new, scales = pages_lib.stored(k[begin:end], None if v is None else v[begin:end], pages)
    kv = _in_place(_Numbers, pages.kv, layer, new, numbers, interpret)
    if scales is not None:  # a token of the batch becomes a lane, too; one more block is read
      by_row = jnp.pad(scales.T, ((0, 0), (0, -len(scales) % LANES + LANES)))
      scales = _in_place(_Scales, pages.scales, layer, [by_row], next(windows), interpret)
    pages = dataclasses.replace(pages, kv=kv, scales=scales)
    begin = end
  return pages


def _in_place(
  kind: type["_Numbers"] | type["_Scales"], array, layer, new: list, windows: Windows, interpret
):
  """`array` [N,L,H,T,...] with what is `new` in one layer's windows."""
  _, _, h, _, *width = array.shape
  ring = ring_size(array, windows.size, windows.first.shape[0])
  any_memory = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(_kernel, kind),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(1,),
      in_specs=[(any_memory,) * len(new), any_memory],
      out_specs=any_memory,
      scratch_shapes=[
        pltpu.VMEM((ring, h, windows.size, *width), array.dtype),
        (pltpu.VMEM((ring, *kind.room(new[0].shape, windows.size)), array.dtype),) * len(new),
        pltpu.SemaphoreType.DMA((ring,)),
        pltpu.SemaphoreType.DMA((ring,)),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(array.shape, array.dtype),
    input_output_aliases={6 + len(new): 0},
    compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
    interpret=interpret,
    name=kind.name,
  )(
    layer[None], windows.count[None], windows.shared.astype(jnp.int32)[None], windows.first,
    windows.lengths, windows.slots, tuple(new), array,
  )  # fmt: skip


class _Runs(NamedTuple):
  """The runs of a kernel; see `Windows`."""

  first: jax.Ref  # i32[B] first token of each
  lengths: jax.Ref  # i32[B]
  slots: jax.Ref  # i32[B] slot of the first token


class _Numbers:
  """A token is a row: of a window [H,W,2D], and of the batch [B,H,D]."""

  name = "paged_write"

  @staticmethod
  def room(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Of new tokens in a slot of the ring."""
    return 2 * size, *shape[1:]

  @staticmethod
  def source(runs: _Runs, i, size: int, b: int):
    """The first token to copy, where to, and where the window's first row then is.

    The batch may begin behind that row, or end before the window's last: there are 2W places.
    """
    row = runs.first[i] - jax.lax.rem(runs.slots[i], size)
    begin, to = jnp.clip(row, 0, b - min(size, b)), jnp.where(row < 0, size, 0)
    return begin, to, to + row - begin

  @staticmethod
  def copies(runs: _Runs, i, at, size: int, new_hbm, new_refs):
    """What a run needs of the batch, and its places in a slot of the ring."""
    b = new_hbm[0].shape[0]
    begin, to, _ = _Numbers.source(runs, i, size, b)
    taken = min(size, b)
    return [
      (hbm.at[pl.ds(begin, taken)], ref.at[at, pl.ds(to, taken)])
      for hbm, ref in zip(new_hbm, new_refs)
    ]

  @staticmethod
  def merge(runs: _Runs, i, at, b: int, new_refs, windows_ref):
    """Replaces the run's tokens in its window."""
    size = windows_ref.shape[2]
    begin = jax.lax.rem(runs.slots[i], size)
    _, _, first_row = _Numbers.source(runs, i, size, b)
    for nth, ref in enumerate(new_refs):
      d = ref.shape[-1]
      lanes = slice(nth * d, (nth + 1) * d)
      new = ref[at, pl.ds(first_row, size)].swapaxes(0, 1)
      row = jax.lax.broadcasted_iota(jnp.int32, new.shape, 1)
      live = (row >= begin) & (row < begin + runs.lengths[i])
      windows_ref[at, :, :, lanes] = jnp.where(live, new, windows_ref[at, :, :, lanes])


class _Scales:
  """A token is a lane: of a window [2H,W], and of the batch [2H,B].

      # batch     [. . . . . a b c|d . . . . . . .]     a run that goes to lanes 2 to 5 of its window
      # rolled    [. . a b c d . .|. . . . . . . .]

  The block of lanes where the run begins, and the next one, are rolled until it is in place.
  """

  name = "paged_scales"

  @staticmethod
  def room(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Of new tokens in a slot of the ring."""
    return shape[0], 2 * size

  @staticmethod
  def copies(runs: _Runs, i, at, size: int, new_hbm, new_refs):
    """What a run needs of the batch, and its place in a slot of the ring."""
    (hbm,), (ref,), first = new_hbm, new_refs, runs.first[i]
    begin = pl.multiple_of(first - jax.lax.rem(first, size), size)
    return [(hbm.at[:, pl.ds(begin, 2 * size)], ref.at[at])]

  @staticmethod
  def merge(runs: _Runs, i, at, b: int, new_refs, windows_ref):
    """Replaces the run's tokens in its window."""
    del b
    (new_ref,), size = new_refs, windows_ref.shape[2]
    begin = jax.lax.rem(runs.slots[i], size)
    turn = begin - jax.lax.rem(runs.first[i], size)
    new = pltpu.roll(new_ref[at], jnp.where(turn < 0, turn + 2 * size, turn), axis=1)[:, :size]
    lane = jax.lax.broadcasted_iota(jnp.int32, new.shape, 1)
    live = (lane >= begin) & (lane < begin + runs.lengths[i])
    windows_ref[at] = jnp.where(live, new, windows_ref[at])


def _kernel(
  kind: type[_Numbers] | type[_Scales],
  # scalar prefetch
  layer_ref,  # i32[1]
  count_ref,  # i32[1] runs
  shared_ref,  # i32[1] 1 if two runs are in the same window
  first_ref,  # i32[B] first token of each run
  lengths_ref,  # i32[B]
  slots_ref,  # i32[B] slot of the first token
  # inputs
  new_hbm,  # keys and values, or keys alone: [B,H,D] each; or scales f32[2H,B]
  array_in,  # [N,L,H,T,2D], or f32[N,L,2H,T]
  # outputs
  array_hbm,  # the same memory
  # scratch
  windows_ref,  # [R,H,W,2D], or f32[R,2H,W]; R slots
  new_refs,  # [R,2W,H,D] each, or f32[R,2H,2W]
  read_sems,
  write_sems,
):
  del array_in
  ring, _, size = windows_ref.shape[:3]
  _, num_layers, _, t = array_hbm.shape[:4]
  b, runs = new_hbm[0].shape[0], _Runs(first_ref, lengths_ref, slots_ref)
  count = jnp.where(layer_ref[0] < num_layers, count_ref[0], 0)
  # Runs of one window go one by one: the next one reads what this one wrote.
  alone = shared_ref[0] == 1
  lag, depth = jnp.where(alone, 0, ring // 2), jnp.where(alone, 1, ring)

  def place(i):
    slot = slots_ref[i]
    start = jax.lax.rem(slot, t) - jax.lax.rem(slot, size)
    there = pl.ds(pl.multiple_of(start, size), size)
    return array_hbm.at[jax.lax.div(slot, t), layer_ref[0], :, there]

  def read_tokens(i):
    at = jax.lax.rem(i, ring)
    return [
      pltpu.make_async_copy(*copy, read_sems.at[at])
      for copy in kind.copies(runs, i, at, size, new_hbm, new_refs)
    ]

  def read_window(i):
    at = jax.lax.rem(i, ring)
    return pltpu.make_async_copy(place(i), windows_ref.at[at], read_sems.at[at])

  def write_window(i):
    at = jax.lax.rem(i, ring)
    return pltpu.make_async_copy(windows_ref.at[at], place(i), write_sems.at[at])

  def merge(i):
    kind.merge(runs, i, jax.lax.rem(i, ring), b, new_refs, windows_ref)

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
