"""The table of attention cases for every backend: those of the package, and more of each kind."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from paged_jax import attention
from paged_jax.attention import cases as essential
from paged_jax.attention.cases import Case
from paged_jax.types import Pages, Plan, Tables

device = jax.device_put  # `jnp.asarray` compiles a program per shape


CASES = (
  *essential.ESSENTIAL,
  Case("decode, one token in the cache", (1,), (1,)),
  Case("prefill", (40,), (40,), spare_rows=0),
  Case("prefill of two rows", (20, 33), (20, 33), spare_rows=0),
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
  Case("head dim 80 padded", (9, 140), (1, 6), head_dim=80, storage_head_dim=128, page_size=16),
  Case("head dim 96 padded, bfloat16", (9, 64), (1, 30), head_dim=96, storage_head_dim=128,
       dtype="bfloat16", page_size=16, softcap=3.0, sinks=True, spare_rows=0),
  Case("page size 1", (9, 4, 17), (1, 3, 5), page_size=1),
  Case("page size 8", (9, 8, 17), (1, 3, 5), page_size=8),
  Case("page size 16", (9, 16, 37), (1, 3, 5), page_size=16),
  Case("several chunks, prefill", (1100, 90), (90, 64), page_size=8, spare_rows=0),
  Case("window", (9, 30, 5), (3, 8, 1), window=4),
  Case("window 1", (9, 30, 5), (3, 8, 1), window=1, traced=True),
  Case("window far behind", (1700, 3, 600), (4, 3, 2), window=20, page_size=16),
  Case("window traced", (9, 30, 5), (3, 8, 1), window=7, traced=True),
  Case("window traced, none", (9, 30, 5), (3, 8, 1), window=2**31 - 1, traced=True),
  Case("scale", (9, 14), (1, 6), scale=0.3),
  Case("softcap traced", (9, 14), (1, 6), softcap=5.0, traced=True),
  Case("sinks", (9, 14, 40), (1, 6, 25), sinks=True, spare_rows=0),
  Case("everything", (9, 64), (2, 30), starts=(2, 0), padding=1, refused=(8,), scale=0.4, window=11,
       softcap=3.0, sinks=True, traced=True, spare_rows=0),
  Case("bfloat16", (9, 64), (1, 30), dtype="bfloat16", head_dim=64, spare_rows=0),
  Case("bfloat16 bits", (9, 640), (1, 30), dtype="bfloat16", bits=True, page_size=16),
  Case("bfloat16, page size 1", (9, 64), (1, 3), dtype="bfloat16", page_size=1),
  Case("bfloat16, one page per row", (2, 3), (1, 1), dtype="bfloat16", page_size=64),
  Case("bfloat16 pages, float32 queries", (9, 64), (1, 3), dtype="bfloat16", q_dtype="float32"),
  Case("bfloat16, everything", (9, 64), (2, 30), starts=(2, 0), padding=1, scale=0.4, window=11,
       softcap=3.0, sinks=True, dtype="bfloat16", bits=True, spare_rows=0),
  Case("parts, window, refused", (40, 9, 64), (1, 1, 30), window=7, refused=(1, 20), traced=True,
       softcap=3.0, sinks=True, spare_rows=0, parts=((2, 3), (30, 1))),
  Case("values in keys", (9, 4, 37), (1, 1, 1), num_heads=16, num_kv_heads=1, head_dim=24,
       value_dim=16, page_size=8, softcap=3.0),
  Case("values in keys, prompts", (9, 64), (5, 30), num_heads=16, num_kv_heads=1, head_dim=24,
       value_dim=16, page_size=8, sinks=True, window=20, starts=(2, 0), padding=1, refused=(8,)),
  Case("values in keys of two heads, stored wider", (9, 40), (1, 6), head_dim=24, value_dim=16,
       storage_head_dim=32, page_size=8, spare_rows=0),
  Case("values are the keys", (9, 14), (1, 6), head_dim=16, value_dim=16, page_size=8),
  Case("values in keys, 512 of 576 channels", (600, 9), (1, 3), num_heads=16, num_kv_heads=1,
       head_dim=576, value_dim=512, storage_head_dim=640, page_size=16, dtype="bfloat16"),
  Case("values in keys, bfloat16 bits", (9, 64), (2, 30), num_heads=16, num_kv_heads=1, head_dim=24,
       value_dim=16, page_size=16, dtype="bfloat16", bits=True, spare_rows=0),
  *(Case(f"{dtype}{kind}", **{"lengths": (9, 64), "queries": (1, 30), "spare_rows": 0} | fields,
         dtype=dtype)
    for dtype in ("int8", "float8_e4m3fn") for kind, fields in {
      ", everything": dict(starts=(2, 0), queries=(2, 30), padding=1, refused=(8,), scale=0.4, window=11,
                           softcap=3.0, sinks=True, traced=True, q_dtype="bfloat16"),
      ", float32 queries": dict(q_dtype="float32", head_dim=16, page_size=16),
      ", bits": dict(q_dtype="bfloat16", bits=True, page_size=16, head_dim=64),
      ", float16 queries": dict(q_dtype="float16"),
      ", values in keys": dict(num_heads=16, num_kv_heads=1, head_dim=24, value_dim=16, page_size=8,
                               q_dtype="float32"),
      ", head dim 80 padded, several chunks": dict(
        lengths=(1700, 3, 600), queries=(1, 3, 2), head_dim=80, storage_head_dim=128, page_size=128,
        q_dtype="bfloat16"),
      ", large pages, everything": dict(
        lengths=(9, 300), starts=(2, 130), queries=(2, 30), padding=1, refused=(8,), window=140,
        softcap=3.0, sinks=True, traced=True, q_dtype="bfloat16", page_size=128),
      ", large pages, values in keys": dict(
        lengths=(9, 300), num_heads=16, num_kv_heads=1, head_dim=24, value_dim=16, page_size=128,
        q_dtype="float32"),
    }.items()),
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
  made = essential.build(case, seed)
  stale = np.zeros(len(made.lengths), bool)
  scales = None if made.scales is None else device(made.scales)
  pages = Pages(device(made.kv), np.dtype(case.dtype), case.head_dim, case.value_dim, scales)
  kept = Tables(*map(device, (made.block_tables, made.starts, made.lengths, stale)))
  return Problem(
    q=device(made.q),
    pages=pages,
    layer=essential.LAYER,
    tables=kept,
    plan=plan(made.rows, made.positions, pages, kept, refused=case.refused, parts=case.parts),
    options=_options(case, made.sinks),
    k=made.k,
    v=made.v,
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


def dense(case: Case, p: Problem) -> tuple[np.ndarray, np.ndarray]:
  """Attention in float64, of what a test may have changed in a problem."""
  tables, plan = p.tables, p.plan
  arrays = (
    p.q, p.pages.kv, p.pages.scales, tables.block_tables, tables.starts, tables.lengths, plan.rows, plan.positions,
    plan.slots, plan.ok, p.options["sinks"], p.k, p.v,
  )  # fmt: skip
  made = (None if x is None else np.asarray(x) for x in arrays)
  return essential.dense(case, essential.Problem(*made))


def _options(case: Case, sinks: np.ndarray | None) -> dict[str, Any]:
  dtypes = {"scale": np.float32, "window": np.int32, "softcap": np.float32}
  options = {name: getattr(case, name) for name in dtypes}
  if case.traced:
    options |= {n: device(dtypes[n](x)) for n, x in options.items() if x is not None}
  return options | {"sinks": None if sinks is None else device(sinks)}
