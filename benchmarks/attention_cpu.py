"""Is paged decode attention on CPU as fast as attention over contiguous keys and values?

Compares `paged_jax.attend`, over shuffled pages, with the best of three ways to attend to the same
tokens without pages (einsum over [B,X,H,D], einsum over [B,H,X,D], `dot_product_attention`), and
with gathering the pages first. All know the rows' lengths only as data. Medians, interleaved.
`window_share`: eight long rows with a window of 100 tokens over the same rows without it.
`short_rows_share`: one long row and seven of 16 tokens over eight long rows.
"""

import argparse
import dataclasses
import functools
import statistics

import measure  # isort: skip  # sets XLA_FLAGS, so it comes before jax
import jax
import jax.numpy as jnp
import numpy as np

import paged_jax

Q, H, D, T = 32, 8, 128, 16
BATCHES, CONTEXTS = (1, 8, 32), (512, 2048, 8192)
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  dtype: str
  lengths: tuple[int, ...]
  queries: int = 1  # of each row's last tokens

  @property
  def context(self) -> int:
    return max(self.lengths)

  @property
  def kv_bytes(self) -> int:
    return sum(self.lengths) * H * 2 * D * np.dtype(self.dtype).itemsize


def cases(quick: bool) -> list[Case]:
  batches, contexts = (BATCHES[:2], CONTEXTS[:2]) if quick else (BATCHES, CONTEXTS)
  decode = [Case("decode", dtype, (x,) * b) for dtype in DTYPES for b in batches for x in contexts]
  longest = contexts[-1]
  ragged = tuple(longest * (i + 1) // 8 for i in range(8))
  return decode + [
    Case(name, dtype, lengths, queries)
    for dtype in DTYPES
    for name, lengths, queries in (("ragged", ragged, 1), ("prefill", (1024,), 1024))
  ]


def paged(case: Case):
  """A cache whose rows lie on shuffled pages, and the plan of one step."""
  b, per_row = len(case.lengths), -(-case.context // T)
  config = paged_jax.CacheConfig(
    num_layers=1, num_kv_heads=H, head_dim=D, page_size=T, num_pages=b * per_row, num_rows=b,
    max_length=case.context, dtype=case.dtype,
  ).stored_for("cpu")  # fmt: skip
  noise = np.random.default_rng(0).standard_normal(1_000_003).astype(case.dtype)
  kv = np.resize(noise.view(config.array_dtype), (config.num_pages, 1, H, T, 2 * D))
  ids = np.random.default_rng(1).permutation(config.num_pages).reshape(b, per_row)
  cache = paged_jax.init(config)
  pool = dataclasses.replace(cache.ledger.pool, refcount=jnp.ones(config.num_pages, jnp.int32))
  tables = dataclasses.replace(
    cache.ledger.tables,
    block_tables=jnp.asarray(ids, jnp.int32),
    lengths=jnp.asarray(case.lengths, jnp.int32),
  )
  cache = dataclasses.replace(
    cache,
    ledger=dataclasses.replace(cache.ledger, pool=pool, tables=tables),
    pages=dataclasses.replace(cache.pages, kv=jnp.asarray(kv)),
  )
  rows = jnp.repeat(jnp.arange(b, dtype=jnp.int32), case.queries)
  last = jnp.asarray(case.lengths, jnp.int32)[:, None] - case.queries
  positions = (last + jnp.arange(case.queries, dtype=jnp.int32)[None]).reshape(-1)
  return cache, jax.jit(paged_jax.plan)(cache, rows, positions)


def einsum_attention(q, k, v, lengths, *, layout: str):
  """[B,I,Q,D] queries over contiguous keys and values, the last of which is at `lengths`."""
  b, i, _, d = q.shape
  q = q.reshape(b, i, H, -1, d).swapaxes(1, 2).reshape(b, H, -1, d)
  logits = jnp.einsum(f"bhmd,{layout}->bhmx", q, k, preferred_element_type=jnp.float32)
  last = jnp.repeat(lengths[:, None] - i + jnp.arange(i)[None], Q // H, axis=1)
  seen = jnp.arange(logits.shape[-1])[None, None] <= last[..., None]
  logits = jnp.where(seen[:, None], logits * d**-0.5, -jnp.inf)
  p = jax.nn.softmax(logits).astype(v.dtype)
  out = jnp.einsum(f"bhmx,{layout}->bhmd", p, v, preferred_element_type=jnp.float32)
  return out.reshape(b, H, i, -1, d).swapaxes(1, 2).reshape(b, i, Q, d).astype(q.dtype)


def fused_attention(q, k, v, lengths):
  return jax.nn.dot_product_attention(
    q, k, v, key_value_seq_lengths=lengths, is_causal=q.shape[1] > 1
  )


def gathered_attention(q, cache, rows):
  k, v = paged_jax.gather(cache, 0, rows)
  return einsum_attention(q, k, v, cache.lengths, layout="bxhd")


def contestants(case: Case):
  """Closures by name; each returns the same values."""
  cache, plan = paged(case)
  b = len(case.lengths)
  q = jax.random.normal(jax.random.key(0), (b, case.queries, Q, D)).astype(case.dtype)
  flat = q.reshape(-1, Q, D)
  rows = jnp.arange(b, dtype=jnp.int32)
  lengths = cache.lengths
  k, v = jax.jit(paged_jax.gather, static_argnums=1)(cache, 0, rows)
  k_heads, v_heads = (jnp.copy(x.swapaxes(1, 2)) for x in (k, v))
  by_token = jax.jit(lambda *args: einsum_attention(*args, layout="bxhd"))
  by_head = jax.jit(lambda *args: einsum_attention(*args, layout="bhxd"))
  fused, gathered = jax.jit(fused_attention), jax.jit(gathered_attention)
  attend = jax.jit(paged_jax.attend, static_argnums=1)
  return {
    "paged": lambda: attend(cache, 0, flat, plan),
    "by token": lambda: by_token(q, k, v, lengths),
    "by head": lambda: by_head(q, k_heads, v_heads, lengths),
    "fused": lambda: fused(q, k, v, lengths),
    "gathered": lambda: gathered(q, cache, rows),
  }


def shares(context: int) -> dict[str, float]:
  """The time of attention to few tokens over that of attention to all of eight rows."""

  def decode(*lengths, **options):
    cache, plan = paged(Case("decode", "float32", lengths))
    q = jax.random.normal(jax.random.key(0), (len(lengths), Q, D))
    attend = jax.jit(functools.partial(paged_jax.attend, **options), static_argnums=1)
    return lambda: attend(cache, 0, q, plan)

  whole, ends = (context,) * 8, (context, *(16,) * 7)
  fns = {"whole": decode(*whole), "window": decode(*whole, window=100), "ends": decode(*ends)}
  times = measure.medians(fns, rounds=7)
  return {
    "window_share": times["window"] / times["whole"],  # at most 0.2
    "short_rows_share": times["ends"] / times["whole"],  # at most 0.5
  }


def read_bandwidth() -> float:
  """Bytes per second of summing an array larger than the caches."""
  x = np.ones(2**27, np.float32)
  on_device, total = jnp.asarray(x), jax.jit(jnp.sum)
  times = measure.medians({"numpy": x.sum, "jax": lambda: total(on_device)}, rounds=7)
  return x.nbytes / min(times.values())


def compare(case: Case, bandwidth: float, budget: float) -> dict:
  """One row of the table; `budget` is about how many seconds it may take."""
  fns = contestants(case)
  outs = {name: np.asarray(fn().reshape(-1, Q, D), np.float32) for name, fn in fns.items()}
  for name, out in outs.items():
    np.testing.assert_allclose(out, outs["paged"], atol=0.03, err_msg=f"{case.name}: {name}")
  turn = sum(measure.seconds(fn) for fn in fns.values())
  times = measure.medians(fns, rounds=int(min(51, max(5, budget / turn))))
  by_token = min(times["by token"], times["fused"])
  return {
    "case": case.name,
    "dtype": case.dtype,
    "batch": len(case.lengths),
    "context": case.context,
    **{f"{name} ms": round(1e3 * t, 3) for name, t in times.items()},
    "vs contiguous": times["paged"] / min(by_token, times["by head"]),
    "vs by token": times["paged"] / by_token,
    "vs gathered": times["paged"] / times["gathered"],
    "of read bandwidth": case.kv_bytes / times["paged"] / bandwidth,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
  args = parser.parse_args()
  bandwidth = read_bandwidth()
  rows = [compare(case, bandwidth, 0.5 if args.quick else 3) for case in cases(args.quick)]
  decode = [row for row in rows if row["case"] == "decode"]
  ratios = [row["vs contiguous"] for row in decode]
  summary = {
    "median_vs_contiguous": statistics.median(ratios),  # at most 0.8
    "worst_vs_contiguous": max(ratios),  # at most 1.1
    "median_vs_by_token": statistics.median(row["vs by token"] for row in decode),
    "worst_vs_by_token": max(row["vs by token"] for row in decode),
    **shares(CONTEXTS[1] if args.quick else CONTEXTS[-1]),
    "read_gb_per_s": bandwidth / 1e9,
  }
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
