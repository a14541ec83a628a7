"""One table of attention cases for every backend, and the cache states that they stand for.

A case says how long each row is and how many of its last tokens are queries. `build` scatters the
rows over shuffled pages, ids 0 and N-1 among them, and leaves NaN in every place that holds no
live token: free pages, other layers, slots before `starts` and beyond `lengths`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from paged_jax import attention
from paged_jax.types import Pages, Plan, Tables

device = jax.device_put  # `jnp.asarray` compiles a program per shape


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  lengths: tuple[int, ...]  # tokens of each row, queries included
  queries: tuple[int, ...]  # of each row's last tokens
  starts: tuple[int, ...] = ()  # none: all 0
  padding: int = 0  # tokens of padding before each row's, and at the end
  refused: tuple[int, ...] = ()  # tokens of the batch that are not ok
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 8
  page_size: int = 3
  dtype: str = "float32"
  bits: bool = False  # pages stored as unsigned integers
  q_dtype: str = ""  # none: dtype
  scale: float | None = None
  window: int | None = None
  softcap: float | None = None
  sinks: bool = False
  traced: bool = False  # scale, window and softcap are arrays
  parts: tuple[tuple[int, int], ...] | None = None  # of the batch: tokens and most rows
  spare_rows: int = 1

  @property
  def tolerance(self) -> float:
    """Relative to values of about 1."""
    return {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[self.dtype]


CASES = (
  Case("decode", (9, 4, 17), (1, 1, 1)),
  Case("decode, one token in the cache", (1,), (1,)),
  Case("prefill", (40,), (40,), spare_rows=0),
  Case("prefill of two rows", (20, 33), (20, 33), spare_rows=0),
  Case("chunked prefill", (50, 31), (16, 12), spare_rows=0),
  Case("verification, several tokens per row", (9, 14, 30), (4, 4, 4)),
  Case("mixed", (40, 9, 12, 31), (25, 1, 1, 20), spare_rows=0),
  Case("mixed, many spare rows", (40, 9, 12), (5, 1, 1), spare_rows=20),
  Case("lengths at page boundaries", (3, 6, 7, 5, 1), (3, 1, 2, 1, 1)),
  Case("empty rows", (0, 7, 0, 5), (0, 1, 0, 2), spare_rows=0),
  Case("padding between rows", (9, 30, 5), (2, 17, 1), padding=3, spare_rows=0),
  Case("tokens refused", (9, 30, 5), (2, 9, 1), refused=(0, 4, 5, 11)),
  Case("rows that start late", (9, 30, 5), (3, 8, 1), starts=(4, 22, 4)),
  Case("heads MHA", (9, 14), (1, 6), num_heads=3, num_kv_heads=3),
  Case("heads MQA", (9, 14), (1, 6), num_heads=5, num_kv_heads=1),
  Case("heads 32 over 8", (9, 64), (1, 6), num_heads=32, num_kv_heads=8, page_size=16),
  Case("head dim 5", (9, 14), (1, 6), head_dim=5),
  Case("head dim 64", (9, 140), (1, 6), head_dim=64, page_size=16),
  Case("head dim 128", (9, 140), (1, 6), head_dim=128, page_size=16),
  Case("page size 1", (9, 4, 17), (1, 3, 5), page_size=1),
  Case("page size 8", (9, 8, 17), (1, 3, 5), page_size=8),
  Case("page size 16", (9, 16, 37), (1, 3, 5), page_size=16),
  Case("several chunks", (1700, 3, 600), (1, 3, 2), page_size=16),
  Case("several chunks, prefill", (1100, 90), (90, 64), page_size=8, spare_rows=0),
  Case("window", (9, 30, 5), (3, 8, 1), window=4),
  Case("window 1", (9, 30, 5), (3, 8, 1), window=1, traced=True),
  Case("window far behind", (1700, 3, 600), (4, 3, 2), window=20, page_size=16),
  Case("window traced", (9, 30, 5), (3, 8, 1), window=7, traced=True),
  Case("window traced, none", (9, 30, 5), (3, 8, 1), window=2**31 - 1, traced=True),
  Case("window and start", (9, 30, 5), (3, 8, 1), window=7, starts=(2, 18, 0),
       traced=True),
  Case("scale", (9, 14), (1, 6), scale=0.3),
  Case("softcap", (9, 14), (1, 6), softcap=1.5),
  Case("softcap traced", (9, 14), (1, 6), softcap=5.0, traced=True),
  Case("sinks", (9, 14, 40), (1, 6, 25), sinks=True, spare_rows=0),
  Case("sinks, padding, refused", (9, 14), (1, 6), sinks=True, padding=2, refused=(4,)),
  Case("everything", (9, 64), (2, 30), starts=(2, 0), padding=1, refused=(8,), scale=0.4, window=11,
       softcap=3.0, sinks=True, traced=True, spare_rows=0),
  Case("bfloat16", (9, 64), (1, 30), dtype="bfloat16", head_dim=64, spare_rows=0),
  Case("bfloat16 bits", (9, 640), (1, 30), dtype="bfloat16", bits=True, page_size=16),
  Case("bfloat16, page size 1", (9, 64), (1, 3), dtype="bfloat16", page_size=1),
  Case("bfloat16, one page per row", (2, 3), (1, 1), dtype="bfloat16", page_size=64),
  Case("bfloat16 pages, float32 queries", (9, 64), (1, 3), dtype="bfloat16", q_dtype="float32"),
  Case("bfloat16, everything", (9, 64), (2, 30), starts=(2, 0), padding=1, scale=0.4, window=11,
       softcap=3.0, sinks=True, dtype="bfloat16", bits=True, spare_rows=0),
  Case("parts, rows that decode and prompts", (40, 9, 30, 31), (1, 1, 25, 20), padding=0,
       spare_rows=0, parts=((2, 2), (45, 2))),
  Case("parts, drafts and a prompt, idle rows", (9, 14, 0, 40), (3, 3, 0, 30), padding=2,
       parts=((12, 4), (34, 1))),
  Case("parts, window, refused", (40, 9, 64), (1, 1, 30), window=7, refused=(1, 20), traced=True,
       softcap=3.0, sinks=True, spare_rows=0, parts=((2, 3), (30, 1))),
  Case("float16", (9, 64), (1, 30), dtype="float16", head_dim=64),
  Case("float16 bits", (9, 64), (1, 30), dtype="float16", bits=True),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
  """A case's arrays. `k` and `v` are its rows in token order, f32[S,X,H,D], 0 where not live."""

  q: jax.Array
  pages: Pages
  layer: int
  tables: Tables
  plan: Plan
  options: dict[str, Any]
  k: np.ndarray
  v: np.ndarray
  parts: tuple[tuple[int, int], ...] | None = None

  def attend(self, implementation: str, **changes) -> tuple[jax.Array, jax.Array]:
    """The backend's answer; `changes` replace fields."""
    p = dataclasses.replace(self, **changes)
    arrays = {name: x for name, x in p.options.items() if isinstance(x, jax.Array)}
    statics = tuple((name, x) for name, x in p.options.items() if name not in arrays)
    interpreted = attention.platform(implementation) not in (None, jax.default_backend())
    run = _interpret if interpreted else _attend
    tokens = (p.plan.rows, p.plan.positions, p.plan.ok)
    return run(p.q, p.pages, p.tables, tokens, arrays, implementation, p.layer, statics, p.parts)


def _call(q, pages, tables, tokens, arrays, implementation, layer, statics, parts):
  plan = traced_plan(*tokens, pages, tables, implementation, parts)
  return attention.attend(q, pages, layer, tables, plan, **dict(statics), **arrays)


# An interpreter runs once and on little data: most of its time would go to LLVM's optimizer.
INTERPRETER = {"xla_backend_optimization_level": 0}
_STATIC = ("implementation", "layer", "statics", "parts")
_attend = jax.jit(_call, static_argnames=_STATIC)
_interpret = jax.jit(_call, static_argnames=_STATIC, compiler_options=INTERPRETER)
_kept = [None]


def forget(keep=None):
  """The programs so far, except those of `keep`, an interpreter's name."""
  if keep is None or _kept != [keep]:
    _attend.clear_cache()
    _interpret.clear_cache()
  _kept[:] = [keep]


def build(case: Case, seed: int = 0) -> Problem:
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
  rows_kv = rng.standard_normal((2, len(tables), per_row * t, h, d)).astype(case.dtype)
  kv = np.full((n, 2, h, t, 2 * d), np.nan, rows_kv.dtype)
  layer = 1
  for row, (start, length) in enumerate(zip(starts, lengths)):
    for page in range(firsts[row], firsts[row] + counts[row]):
      tables[row, page], ids = ids[0], ids[1:]
    for position in range(start, length):
      page, offset = tables[row, position // t], position % t
      kv[page, layer, :, offset] = np.concatenate(rows_kv[:, row, position], axis=-1)
  positions = np.arange(per_row * t)
  pad = (0, case.spare_rows)
  starts, lengths = np.pad(starts, pad), np.pad(lengths, pad)
  live = (positions >= starts[:, None]) & (positions < lengths[:, None])
  k, v = np.where(live[..., None, None], rows_kv.astype(np.float32), 0)

  pages = Pages(kv=device(kv), dtype=np.dtype(case.dtype))
  if case.bits:
    pages = dataclasses.replace(pages, kv=device(kv.view(f"uint{8 * kv.itemsize}")))
  rows, positions = _batch(case, len(tables))
  q = rng.standard_normal((len(rows), case.num_heads, d)).astype(case.q_dtype or case.dtype)
  kept = Tables(*map(device, (tables, starts, lengths, np.zeros(len(tables), bool))))
  return Problem(
    q=device(q),
    pages=pages,
    layer=layer,
    tables=kept,
    plan=plan(rows, positions, pages, kept, refused=case.refused, parts=case.parts),
    options=_options(case, rng),
    k=k,
    v=v,
    parts=case.parts,
  )


def plan(
  rows, positions, pages, tables: Tables, *, refused=(), implementation="reference", parts=None
) -> Plan:
  """A plan made by hand: attention reads neither slots nor refcounts."""
  rows, positions = np.asarray(rows, np.int32), np.asarray(positions, np.int32)
  ok = np.ones(len(rows), bool)
  ok[list(refused)] = False
  return traced_plan(rows, positions, ok, pages, tables, implementation, parts)


@partial(jax.jit, static_argnames=("implementation", "parts"))
def traced_plan(rows, positions, ok, pages, tables: Tables, implementation: str, parts) -> Plan:
  live = ok & (rows < tables.lengths.shape[0])
  cut = attention.cut(implementation, rows, positions, positions, live, pages, tables, parts)
  return Plan(rows, positions, positions, ok, cut, implementation=implementation)


def dense(case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
  """Attention in float64 NumPy, token by token, straight from the definition."""
  q = np.asarray(problem.q, np.float64)
  out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
  scale = case.head_dim**-0.5 if case.scale is None else case.scale
  sinks = np.asarray(problem.options["sinks"], np.float64) if case.sinks else None
  starts, *tokens = map(np.asarray, (problem.tables.starts, problem.plan.rows,
                                     problem.plan.positions, problem.plan.ok))  # fmt: skip
  for b, (row, i, ok) in enumerate(zip(*tokens)):
    if not ok or row >= len(problem.k):
      continue
    low = max(starts[row], 0 if case.window is None else i - case.window + 1)
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


def _options(case: Case, rng) -> dict[str, Any]:
  dtypes = {"scale": np.float32, "window": np.int32, "softcap": np.float32}
  options = {name: getattr(case, name) for name in dtypes}
  if case.traced:
    options |= {n: device(dtypes[n](x)) for n, x in options.items() if x is not None}
  sinks = device(rng.standard_normal(case.num_heads, np.float32)) if case.sinks else None
  return options | {"sinks": sinks}


def _batch(case: Case, num_rows: int) -> tuple[list[int], list[int]]:
  rows, positions = [], []
  for row, (length, queries) in enumerate(zip(case.lengths, case.queries)):
    rows += [num_rows] * case.padding + [row] * queries
    positions += [0] * case.padding + [*range(length - queries, length)]
  return rows + [num_rows] * case.padding, positions + [0] * case.padding


def _shuffled(rng, n: int, used: int) -> np.ndarray:
  """`used` distinct ids of `n`, in no order, the first and the last id among them."""
  middle = rng.permutation(np.arange(1, n - 1))[: max(0, used - 2)]
  return rng.permutation(np.concatenate([[n - 1, 0][:used], middle]).astype(np.int32))
