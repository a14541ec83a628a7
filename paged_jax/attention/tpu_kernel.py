"""The body of the TPU attention kernel.

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

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_jax.attention import softmax

LANES = 128
LN2 = math.log(2)
SMALL = 64  # queries of a block whose logits of all heads are found first


def kernel(
  # scalar prefetch
  places_ref,  # i32[G] where its queries are
  rows_ref,  # i32[G]
  starts_ref,  # i32[G]
  lows_ref,  # i32[G]
  highs_ref,  # i32[G]
  numbers_ref,  # i32[2] layer, window
  # inputs
  factors_ref,  # f32[2] of the logits, and of their tanh
  q_ref,  # [1,H,M,D]
  last_ref,  # i32[1,M,1], None where blocks have one token
  sinks_ref,  # f32[H,M,128] or None
  tables_hbm,  # i32[S,P]
  pages_hbm,  # numbers [N,L,H,T,2D], and of 8-bit pages scales f32[N,L,2H,T]
  # outputs
  out_ref,  # [1,H,M,D]
  lse_ref,  # f32[1,M,H] or None
  # scratch
  ids_ref,  # i32[2,P] in SMEM
  pages_refs,  # [2,C,H,T,2D], f32[2,C,2H,T]
  turn_ref,  # i32[1] in SMEM: chunks so far
  ids_sems,
  pages_sems,
  *,
  values: tuple[int, int],
  softcapped: bool,
):
  """Attention of one block of queries.

  Keys are the first lanes of `kv_ref`, as many as queries have; `values` are the lanes of values,
  the last of them those of `out_ref`:

      # lanes of a token    [keys | values]     [values in keys | rest of keys]

  8-bit numbers are exact in bfloat16, so their scales multiply logits and weights instead: a token
  is a lane there as it is in a row of scales.
  """
  del places_ref
  g, num_blocks = pl.program_id(0), pl.num_programs(0)
  kv_ref, *scales_refs = pages_refs
  _, c, h, t, _ = kv_ref.shape
  chunk, m, window = c * t, q_ref.shape[2], numbers_ref[1]
  dtype = softmax.operand_dtype(q_ref.dtype, kv_ref.dtype)
  copies = _Copies(tables_hbm, pages_hbm, ids_ref, pages_refs, ids_sems, pages_sems, numbers_ref)

  def span(block):
    """What a block sees; no pages behind the last block."""
    at = jnp.minimum(block, num_blocks - 1)
    begin = jnp.maximum(starts_ref[at], lows_ref[at] - window + 1)
    end = highs_ref[at] + 1
    pages = jnp.maximum(pl.cdiv(end, t) - begin // t, 0)
    return _Span(begin, end, begin // t, jnp.where(block < num_blocks, pages, 0))

  mine = span(g)
  num_chunks = pl.cdiv(mine.num_pages, c)

  @pl.when(g == 0)
  def _():
    turn_ref[0] = 0
    copies.ids(0, rows_ref[0]).start()
    copies.ids(0, rows_ref[0]).wait()
    copies.start(0, mine, 0, 0, unroll=False)

  def following():
    return copies.ids(g + 1, rows_ref[g + 1])

  @pl.when(g + 1 < num_blocks)
  def _():
    following().start()

  turn = turn_ref[0]

  @pl.when((num_chunks == 0) & (g + 1 < num_blocks))
  def _():
    following().wait()
    copies.start(g + 1, span(g + 1), 0, turn % 2, unroll=False)

  def add_chunk(number, sums):
    slot, final = (turn + number) % 2, number + 1 == num_chunks

    @pl.when(final & (g + 1 < num_blocks))
    def _():
      following().wait()

    block, ahead = jnp.where(final, g + 1, g), jnp.where(final, 0, number + 1)
    copies.start(block, span(block), ahead, 1 - slot, unroll=True)
    copies.wait(mine, number, slot)
    base = mine.first_page * t + number * chunk

    @pl.when((base < mine.begin) | (base + chunk > mine.end))
    def _():
      if kv_ref.dtype != jnp.int8:  # the only one without NaN
        _clear(kv_ref.at[slot], base, mine, slice(values[0], None))
      for ref in scales_refs:
        _clear(ref.at[slot], base, mine)

    at = base + jax.lax.broadcasted_iota(jnp.int32, (m, chunk), 1)
    if last_ref is None:
      seen = (at >= mine.begin) & (at < mine.end)
    else:
      last = last_ref[0]
      seen = (at >= jnp.maximum(starts_ref[g], last - window + 1)) & (at <= last)

    def keys_and_values(head):
      kv = kv_ref[slot, :, head].reshape(chunk, kv_ref.shape[-1])
      k, v = kv[:, : q_ref.shape[3]], kv[:, slice(*values)]
      return k.astype(dtype), v.astype(dtype)

    def scales(head, nth):
      """f32[1,X] of a head's keys, or of its values; the same if these are in the keys."""
      (ref,) = scales_refs
      each = ref.shape[2] // h
      row = pl.ds(head * each + min(nth, each - 1), 1)
      return jnp.concatenate([ref[slot, i, row] for i in range(c)], axis=-1)

    def logits(head):
      k, _ = keys_and_values(head)
      found = softmax.product(q_ref[0, head].astype(dtype), k)
      factor = factors_ref[0] * scales(head, 0) if scales_refs else factors_ref[0]
      found = found * factor
      found = factors_ref[1] * jnp.tanh(found) if softcapped else found
      return jnp.where(seen, found, -jnp.inf)

    # One head's softmax overlaps with the products of those ahead: all of them if they are small.
    ahead = h if m <= SMALL else 1
    found, made = [logits(i) for i in range(ahead)], []
    for i in range(h):
      found += [logits(i + ahead)] if i + ahead < h else []
      v = keys_and_values(i)[1]
      made.append(
        softmax.step(sums[i], found[i], v, jnp.exp2, scales(i, 1) if scales_refs else None)
      )
    return tuple(made)

  lanes = LANES if chunk % LANES == 0 and q_ref.shape[3] % LANES == 0 else 1
  shape = m, lanes, values[1] - values[0]
  start = tuple(_start(None if sinks_ref is None else sinks_ref[i], *shape) for i in range(h))
  sums = jax.lax.fori_loop(0, num_chunks, add_chunk, start)
  turn_ref[0] = turn + num_chunks
  for i in range(h):
    out, lse = softmax.finish(sums[i], LN2)
    out_ref[0, i] = out[:, -out_ref.shape[3] :].astype(out_ref.dtype)
    if lse_ref is not None:
      lse_ref[0, :, i : i + 1] = lse[:, :1]


class _Span(NamedTuple):
  """What a block sees."""

  begin: jax.Array  # i32[] first position
  end: jax.Array  # i32[] behind the last one
  first_page: jax.Array  # i32[] logical
  num_pages: jax.Array  # i32[]


class _Copies(NamedTuple):
  """What is copied from HBM, and where to."""

  tables_hbm: jax.Ref
  pages_hbm: Sequence[jax.Ref]  # numbers, and scales if there are any
  ids_ref: jax.Ref
  pages_refs: Sequence[jax.Ref]
  ids_sems: jax.Ref
  pages_sems: jax.Ref
  numbers_ref: jax.Ref

  def ids(self, block, row):
    """The copy of a block's row of the table."""
    row, slot = jnp.minimum(row, self.tables_hbm.shape[0] - 1), block % 2
    return pltpu.make_async_copy(
      self.tables_hbm.at[row], self.ids_ref.at[slot], self.ids_sems.at[slot]
    )

  def start(self, block, span: _Span, number, slot, *, unroll: bool):
    """Starts the copies of a chunk's pages."""
    c, last = self.pages_refs[0].shape[1], self.pages_hbm[0].shape[0] - 1

    @pl.loop(0, c, unroll=unroll)
    def _(i):
      nth = number * c + i

      @pl.when(nth < span.num_pages)
      def _():
        page = jnp.minimum(self.ids_ref[block % 2, span.first_page + nth], last)
        for hbm, ref in zip(self.pages_hbm, self.pages_refs):
          there = hbm.at[page, self.numbers_ref[0]]
          pltpu.make_async_copy(there, ref.at[slot, i], self.pages_sems.at[slot]).start()

  def wait(self, span: _Span, number, slot):
    """Waits for them; for a full chunk at once."""
    c, sem = self.pages_refs[0].shape[1], self.pages_sems.at[slot]
    live = jnp.minimum(span.num_pages - number * c, c)

    @pl.when(live == c)
    def _():
      for ref in self.pages_refs:
        _wait(ref.at[slot], sem)

    @pl.loop(0, jnp.where(live == c, 0, live))
    def _(i):
      for ref in self.pages_refs:
        _wait(ref.at[slot, i], sem)


def _wait(there, sem):
  """Waits until as many bytes as `there` has are in."""
  pltpu.make_async_copy(there, there, sem).wait()


def _clear(ref, base, span: _Span, *lanes: slice):
  """Zeroes values [C,H,T,`lanes`], or scales [C,2H,T], outside the span: 0 * NaN is NaN, so nothing
  stale may be multiplied."""
  c, _, t = ref.shape[:3]

  @pl.loop(0, c)
  def _(i):
    first = base + i * t

    @pl.when((first < span.begin) | (first + t > span.end))
    def _():
      page = (i, slice(None), slice(None), *lanes)
      values = ref[page]
      at = first + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
      live = (at >= span.begin) & (at < span.end)
      ref[page] = jnp.where(live, values, jnp.zeros_like(values))


def _start(sinks: jax.Array | None, m: int, lanes: int, width: int) -> softmax.Sums:
  """Nothing seen, or the sinks [M,128] alone, which count in lane 0."""
  acc = jnp.zeros((m, width), jnp.float32)
  if sinks is None:
    return softmax.Sums(jnp.full((m, lanes), -jnp.inf), jnp.zeros((m, lanes)), acc)
  first = jax.lax.broadcasted_iota(jnp.int32, (m, lanes), 1) == 0
  return softmax.Sums(sinks[:, :lanes], jnp.where(first, 1.0, 0.0), acc)
