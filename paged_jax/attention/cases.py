"""Cases of attention: rows over shuffled pages, NaN in every place without a live token, and what
attention over them is, in float64. The rows that each device must get right are `ESSENTIAL`.

A case says how long each row is and how many of its last tokens are queries. Page ids 0 and N-1 are
among those of the rows. NumPy only: nothing here runs on the device that is judged.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from paged_jax import quantization
from paged_jax.config import CacheConfig

LAYER, NUM_LAYERS = 1, 2
LONGEST = 1100  # tokens that `fitted` makes a row longer to, at most


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows of a cache, and which of their tokens attend, how."""

  name: str
  lengths: tuple[int, ...]  # tokens of each row, queries included
  queries: tuple[int, ...]  # of each row's last tokens
  starts: tuple[int, ...] = ()  # none: all 0
  padding: int = 0  # tokens of padding before each row's, and at the end
  refused: tuple[int, ...] = ()  # tokens of the batch that are not ok
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 8
  storage_head_dim: int = 0  # 0: head_dim
  value_dim: int | None = None  # None: keys and values apart
  page_size: int = 3
  dtype: str = "float32"
  bits: bool = False  # pages stored as unsigned integers
  q_dtype: str = ""  # none: dtype, which must then be one of 16 or 32 bits
  scale: float | None = None
  window: int | None = None
  softcap: float | None = None
  sinks: bool = False
  traced: bool = False  # scale, window and softcap are arrays
  parts: tuple[tuple[int, int], ...] | None = None  # of the batch: tokens and most rows
  spare_rows: int = 1

  @property
  def tolerance(self) -> float:
    """Of errors on a CPU, relative to values of about 1; of devices see `proof.TOLERANCES`."""
    dtype = self.q_dtype or self.dtype
    return {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]


ESSENTIAL = (
  Case("decode", (9, 4, 17), (1, 1, 1)),
  Case("several chunks", (1700, 3, 600), (1, 3, 2), page_size=16),
  Case("chunked prefill", (50, 31), (16, 12), spare_rows=0),
  Case("verification, several tokens per row", (9, 14, 30), (4, 4, 4)),
  Case("mixed", (40, 9, 12, 31), (25, 1, 1, 20), spare_rows=0),
  Case("parts, rows that decode and prompts", (40, 9, 30, 31), (1, 1, 25, 20), padding=0,
       spare_rows=0, parts=((2, 2), (45, 2))),
  Case("parts, drafts and a prompt, idle rows", (9, 14, 0, 40), (3, 3, 0, 30), padding=2,
       parts=((12, 4), (34, 1))),
  Case("window and start", (9, 30, 5), (3, 8, 1), window=7, starts=(2, 18, 0),
       traced=True),
  Case("softcap", (9, 14), (1, 6), softcap=1.5),
  Case("sinks, padding, refused", (9, 14), (1, 6), sinks=True, padding=2, refused=(4,)),
)  # fmt: skip


class Problem(NamedTuple):
  """A case's arrays, all of NumPy. `k` and `v` are its rows in token order, 0 where not live.

  With a `value_dim` pages hold keys only, and `v` is the first channels of `k`.
  """

  q: np.ndarray  # [B,Q,D]
  kv: np.ndarray  # storage[N,L,H,T,2*stored D] NaN in every place without a live token
  scales: np.ndarray | None  # f32[N,L,2H,T] of 8-bit pages, NaN there, too
  block_tables: np.ndarray  # i32[S,P]
  starts: np.ndarray  # i32[S]
  lengths: np.ndarray  # i32[S]
  rows: np.ndarray  # i32[B]
  positions: np.ndarray  # i32[B]
  slots: np.ndarray  # i32[B] page * T + offset; distinct ids >= N*T of padding and tokens not ok
  ok: np.ndarray  # bool[B]
  sinks: np.ndarray | None  # f32[Q]
  k: np.ndarray  # f32[S,X,H,D]
  v: np.ndarray  # f32[S,X,H,D]


def essential(config: CacheConfig, num_heads: int) -> Iterator[Case]:
  """The essential rows for a cache's pages; the first one with 1 and with 8 query heads per KV head,
  too."""
  h = config.num_kv_heads
  for case in ESSENTIAL:
    yield fitted(case, config, num_heads)
  for ratio in (1, 8):
    if ratio == num_heads // h:
      continue
    name = f"{ESSENTIAL[0].name}, heads {ratio * h} over {h}"
    yield dataclasses.replace(fitted(ESSENTIAL[0], config, ratio * h), name=name)


def fitted(case: Case, config: CacheConfig, num_heads: int) -> Case:
  """A case for other pages: as many pages as before, and as full, if no row gets too long.

  # page size 3   [0 1 2][3 4 5][6 . .]          7 tokens
  # page size 8   [0 ... 7][8 ... 15][16 . ...]  17 tokens
  """
  size = config.page_size

  def stretched(count: int) -> int:
    full, rest = divmod(count, case.page_size)
    last = size - 1 if rest == case.page_size - 1 else rest
    return max(count, min(full * size + last, LONGEST))

  return dataclasses.replace(
    case,
    lengths=tuple(map(stretched, case.lengths)),
    starts=tuple(
      min(stretched(start), stretched(length) - num_queries)
      for start, length, num_queries in zip(case.starts, case.lengths, case.queries)
    ),
    window=None if case.window is None else stretched(case.window),
    num_heads=num_heads,
    num_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    storage_head_dim=config.array_head_dim,
    value_dim=config.value_dim,
    page_size=size,
    dtype=np.dtype(config.dtype).name,
    q_dtype=case.q_dtype or ("bfloat16" if config.num_scales else ""),
    bits=config.array_dtype != config.dtype,
  )


def build(case: Case, seed: int = 0) -> Problem:
  """The arrays that a case stands for."""
  rng = np.random.default_rng(seed)
  starts = np.array(case.starts or (0,) * len(case.lengths), np.int32)
  lengths = np.array(case.lengths, np.int32)
  t, h, d = case.page_size, case.num_kv_heads, case.head_dim
  # Sizes that many cases share, so that they are data of one program.
  per_row = max(16, 1 << int(-(-max(lengths) // t)).bit_length())
  firsts, ends = starts // t, -(-lengths // t)
  counts = np.where(lengths > 0, ends - firsts, 0)
  used = int(counts.sum())
  n = max(32, 1 << (used + 2).bit_length())
  ids = _shuffled(rng, n, used)

  tables = np.full((len(lengths) + case.spare_rows, per_row), n, np.int32)
  apart = 2 if case.value_dim is None else 1  # arrays: keys and values, or keys alone
  shape = (apart, len(tables), per_row * t, h, d)
  rows_kv, scales = rng.standard_normal(shape, np.float32), None
  rows_scales = np.ones(shape[:-1], np.float32)
  if quantization.quantized(case.dtype):
    rows_kv, rows_scales = quantized(rows_kv, case.dtype)
    scales = np.full((n, NUM_LAYERS, apart * h, t), np.nan, np.float32)
  rows_kv = rows_kv.astype(case.dtype)
  stored = case.storage_head_dim or d
  worst = 127 if case.dtype == "int8" else np.nan
  kv = np.full((n, NUM_LAYERS, h, t, apart * stored), worst, rows_kv.dtype)
  for row, (start, length) in enumerate(zip(starts, lengths)):
    for page in range(firsts[row], firsts[row] + counts[row]):
      tables[row, page], ids = ids[0], ids[1:]
    for position in range(start, length):
      page, offset = tables[row, position // t], position % t
      both = np.pad(rows_kv[:, row, position], ((0, 0), (0, 0), (0, stored - d)))
      kv[page, LAYER, :, offset] = np.concatenate(both, axis=-1)
      if scales is not None:
        scales[page, LAYER, :, offset] = rows_scales[:, row, position].T.reshape(-1)
  positions = np.arange(per_row * t)
  pad = (0, case.spare_rows)
  starts, lengths = np.pad(starts, pad), np.pad(lengths, pad)
  live = (positions >= starts[:, None]) & (positions < lengths[:, None])
  rows_kv = rows_kv.astype(np.float32) * rows_scales[..., None]
  rows_kv = np.where(live[..., None, None], rows_kv, 0)
  k, v = rows_kv[0], rows_kv[-1][..., : case.value_dim]

  rows, positions = _batch(case, len(tables))
  q = rng.standard_normal((len(rows), case.num_heads, d), np.float32)
  ok = np.ones(len(rows), bool)
  ok[list(case.refused)] = False
  pages = np.pad(tables, ((0, 1), (0, 0)), constant_values=n)[rows, positions // t]
  slots = np.where(ok & (pages < n), pages * t + positions % t, n * t + np.arange(len(rows)))
  return Problem(
    q=q.astype(case.q_dtype or case.dtype),
    kv=kv.view(f"uint{8 * kv.itemsize}") if case.bits else kv,
    scales=scales,
    block_tables=tables,
    starts=starts,
    lengths=lengths,
    rows=rows,
    positions=positions,
    slots=slots.astype(np.int32),
    ok=ok,
    sinks=rng.standard_normal(case.num_heads, np.float32) if case.sinks else None,
    k=k,
    v=v,
  )


def quantized(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """Numbers [...,D] and scales f32[...] of x f32[...,D], none of it zero everywhere; in NumPy."""
  limit, top = np.float32(quantization.LIMITS[dtype]), np.abs(x).max(axis=-1)
  numbers = x * (limit / top)[..., None]
  return (np.rint(numbers) if dtype == "int8" else numbers).astype(dtype), top * (1 / limit)


def read(kv: np.ndarray, scales: np.ndarray | None, dtype: DTypeLike) -> np.ndarray:
  """What a page array [N,L,H,T,2D] of values of `dtype` is read as."""
  kv = kv.view(dtype)
  if scales is None:
    return kv
  n, num_layers, h, t, width = kv.shape
  scales = scales.reshape(n, num_layers, h, -1, t).swapaxes(3, 4)
  return kv.astype(np.float32) * np.repeat(scales, width // scales.shape[-1], axis=-1)


def dense(case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
  """Attention in float64, token by token, straight from the definition: [B,Q,D] and LSE [B,Q]."""
  q = np.asarray(problem.q, np.float64)
  out, lse = np.zeros((*q.shape[:2], problem.v.shape[-1])), np.full(q.shape[:2], -np.inf)
  scale = case.head_dim**-0.5 if case.scale is None else case.scale
  sinks = None if problem.sinks is None else problem.sinks.astype(np.float64)
  for b, (row, i, ok) in enumerate(zip(problem.rows, problem.positions, problem.ok)):
    if not ok or row >= len(problem.k):
      continue
    low = max(problem.starts[row], 0 if case.window is None else i - case.window + 1)
    for head in range(case.num_heads):
      kv_head = head // (case.num_heads // case.num_kv_heads)
      logits = problem.k[row, low : i + 1, kv_head].astype(np.float64) @ q[b, head] * scale
      if case.softcap is not None:
        logits = case.softcap * np.tanh(logits / case.softcap)
      weights = np.exp(logits)
      total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
      out[b, head] = weights @ problem.v[row, low : i + 1, kv_head] / total
      lse[b, head] = np.log(total)
  return out, lse


def _batch(case: Case, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows and positions of the batch, i32[B] each; `num_rows` is padding."""
  rows, positions = [], []
  for row, (length, queries) in enumerate(zip(case.lengths, case.queries)):
    rows += [num_rows] * case.padding + [row] * queries
    positions += [0] * case.padding + [*range(length - queries, length)]
  rows, positions = rows + [num_rows] * case.padding, positions + [0] * case.padding
  return np.array(rows, np.int32), np.array(positions, np.int32)


def _shuffled(rng: np.random.Generator, n: int, used: int) -> np.ndarray:
  """`used` distinct ids of `n`, in no order, the first and the last id among them."""
  middle = rng.permutation(np.arange(1, n - 1))[: max(0, used - 2)]
  return rng.permutation(np.concatenate([[n - 1, 0][:used], middle]).astype(np.int32))
