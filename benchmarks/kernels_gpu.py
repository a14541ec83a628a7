"""Does paged decode attention on a GPU read its pages as fast as the GPU can copy memory?

    python benchmarks/kernels_gpu.py --json

Compares one layer's `paged_jax.attend` of one new token per row, over shuffled pages, with jax's own
Pallas kernel, with gathering the pages first (XLA's attention, and cuDNN's), with PyTorch's SDPA over
keys and values already gathered, and with flashinfer, where these are installed; same data, same run.

Neither PyTorch's nor flashinfer's part has been run by us yet.

Dispatch is kept out of the times: one call of a jax contender is many iterations inside one jit, each
with the last one's output as its query. Their number is static, so that XLA needs no look at the host
between them. Each iteration reads another layer, so that nothing is left in the L2 cache. PyTorch and
flashinfer run as many iterations from a CUDA graph. Medians, contenders taking turns.
"""

import argparse
import dataclasses
import functools
import os
import sys
import types

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the rest is PyTorch's

import measure  # isort: skip  # sets XLA_FLAGS, so it comes before jax
import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import attention
from paged_jax import pages as pages_lib
from paged_jax.types import Pages, Plan, Tables

H = 8
BATCHES, CONTEXTS = (1, 8, 32, 128), (512, 2048, 4096, 8192, 32768)
PAGE_SIZES, RATIOS = (16, 64), (8, 4)
CACHED = 200 * 2**20  # bytes that no L2 cache holds
TARGET_BYTES = 2**36  # to read per call: some 20 ms


@dataclasses.dataclass(frozen=True)
class Case:
  batch: int
  context: int
  page_size: int
  ratio: int  # query heads per KV head
  d: int = 128

  @property
  def kv_bytes(self) -> int:
    """Bytes of one layer's keys and values."""
    return self.batch * self.context * H * 2 * self.d * 2

  @property
  def num_layers(self) -> int:
    return max(2, -(-CACHED // self.kv_bytes))  # with 1, XLA could gather before the loop

  @property
  def goal(self) -> float:
    """Share of the bandwidth of a copy that the kernel must reach, 0 where there is no goal."""
    if self.context < 4096 or self.batch < 8:
      return 0.0
    return 0.9 if self.batch >= 32 else 0.75


def cases(memory: int) -> list[Case]:
  every = (
    Case(b, x, t, ratio) for ratio in RATIOS for t in PAGE_SIZES for b in BATCHES for x in CONTEXTS
  )
  return [c for c in every if 4 * c.kv_bytes * c.num_layers < memory]


@dataclasses.dataclass(frozen=True)
class Data:
  q: jax.Array  # [B,Q,D]
  pages: Pages
  tables: Tables
  plan: Plan


def data(case: Case, implementation: str | None) -> Data:
  """A cache whose rows lie on shuffled pages, and one decode step."""
  b, per_row = case.batch, case.context // case.page_size
  q_key, kv_key = jax.random.split(jax.random.key(0))
  shape = (b * per_row, case.num_layers, H, case.page_size, 2 * case.d)
  kv = jax.jit(jax.random.normal, static_argnums=(1, 2))(kv_key, shape, jnp.bfloat16)
  pages = Pages(kv, np.dtype(jnp.bfloat16))
  ids = np.random.default_rng(1).permutation(b * per_row).reshape(b, per_row)
  lengths = jnp.full(b, case.context, jnp.int32)
  rows = jnp.arange(b, dtype=jnp.int32)
  blocks, block_lengths, block_size = attention.schedule(rows, b)
  plan = Plan(
    rows, lengths - 1, rows, rows >= 0, blocks, block_lengths, block_size,
    attention.choose(implementation, pages),
  )  # fmt: skip
  tables = Tables(jnp.asarray(ids, jnp.int32), 0 * rows, lengths, rows < 0)
  q = jax.random.normal(q_key, (b, case.ratio * H, case.d), jnp.bfloat16)
  return Data(q, pages, tables, plan)


def paged(q, layer, pages, tables, plan):
  return attention.attend(q, pages, layer, tables, plan)[0]


def gathered(q, layer, pages, tables, *, implementation):
  k, v = pages_lib.gather(pages, layer, tables.block_tables)
  out = jax.nn.dot_product_attention(
    q[:, None], k, v, key_value_seq_lengths=tables.lengths, implementation=implementation
  )
  return out[:, 0]


def pallas(q, layer, k, v, tables, *, num_pages):
  """jax's own kernel over k, v [H,N*L,T,D]."""
  from jax.experimental.pallas.ops.gpu import paged_attention

  ids = tables.block_tables + layer * num_pages
  splits = max(n for n in (1, 2, 4, 8, 16) if ids.shape[1] % n == 0)
  scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  return paged_attention.paged_attention(scaled, k, v, ids, tables.lengths, k_splits=splits)


def looped(step, num_layers: int, iterations: int):
  """`iterations` dependent steps in one program."""

  @jax.jit
  def run(q, *args):
    def body(i, q):
      return step(q, i % num_layers, *args)

    return jax.lax.fori_loop(0, iterations, body, q)

  return run


def split_by_head(pages: Pages) -> tuple[jax.Array, jax.Array]:
  """Keys and values [H,L*N,T,D], layer by layer."""
  n, num_layers, h, t, d = pages_lib.sizes(pages)
  kv = pages.kv.transpose(2, 1, 0, 3, 4).reshape(h, num_layers * n, t, 2 * d)
  return kv[..., :d], kv[..., d:]


def jax_contestants(case: Case, given: Data, iterations: int) -> dict:
  """Closures by name, each of `iterations` steps."""
  pages, tables = given.pages, given.tables
  steps = {
    "paged": (paged, (pages, tables, given.plan)),
    "gather + xla": (functools.partial(gathered, implementation="xla"), (pages, tables)),
  }
  if jax.default_backend() == "gpu":
    k, v = jax.jit(split_by_head)(pages)
    num_pages = pages.kv.shape[0]
    steps["jax pallas"] = (functools.partial(pallas, num_pages=num_pages), (k, v, tables))
    steps["gather + cudnn"] = (
      functools.partial(gathered, implementation="cudnn"), (pages, tables)
    )  # fmt: skip

  def closure(step, args, iterations):
    run = looped(step, case.num_layers, iterations)
    return lambda: run(given.q, *args)

  found = {}
  for name, (step, args) in steps.items():
    try:
      once = closure(step, args, 1)()
      jax.block_until_ready(once)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
      if name == "paged":
        raise
      print(f"{name} cannot run {case}: {str(error).splitlines()[0]}", file=sys.stderr)
      continue
    agree(name, once, found["paged"][0] if found else once)
    found[name] = (once, closure(step, args, iterations))
  return found


def agree(name: str, got, want) -> None:
  np.testing.assert_allclose(
    np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.03, err_msg=name
  )


def torch_contestants(case: Case, given: Data, iterations: int, want: jax.Array) -> dict:
  """PyTorch and flashinfer on the same arrays, where they are installed with CUDA."""
  try:
    import torch
  except ImportError:
    return {}
  if not torch.cuda.is_available():
    return {}
  steps = {"torch contiguous": torch_contiguous(torch, given)}
  try:
    import flashinfer
  except ImportError:
    pass
  else:
    steps["flashinfer"] = paged_by_flashinfer(torch, flashinfer, case, given)

  found = {}
  for name, step in steps.items():
    agree(name, jnp.from_dlpack(step(0).contiguous()), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      for i in range(iterations):
        step(i % case.num_layers)

    def run(graph=graph):
      graph.replay()
      torch.cuda.synchronize()

    found[name] = run
  return found


def torch_contiguous(torch, given: Data):
  """SDPA over every layer's keys and values in order, [L,B,H,X,D]."""

  @jax.jit
  def order(pages, tables):
    kv = pages.kv[tables.block_tables]  # [B,P,L,H,T,2D]
    kv = kv.transpose(2, 0, 3, 1, 4, 5)
    return kv.reshape(*kv.shape[:3], -1, kv.shape[-1])

  d = given.q.shape[-1]
  kv = torch.from_dlpack(order(given.pages, given.tables))
  k, v = kv[..., :d].contiguous(), kv[..., d:].contiguous()
  q = torch.from_dlpack(given.q)[:, :, None]
  attend = torch.nn.functional.scaled_dot_product_attention
  return lambda layer: attend(q, k[layer], v[layer], enable_gqa=True)[:, :, 0]


def paged_by_flashinfer(torch, flashinfer, case: Case, given: Data):
  n, _, h, t, d = pages_lib.sizes(given.pages)
  k, v = (torch.from_dlpack(x) for x in jax.jit(split_by_head)(given.pages))
  k, v = (x.transpose(0, 1).contiguous() for x in (k, v))  # [L*N,H,T,D]
  b, per_row = given.tables.block_tables.shape
  wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
    torch.empty(2**27, dtype=torch.uint8, device="cuda"), kv_layout="HND"
  )
  wrapper.plan(
    torch.arange(b + 1, dtype=torch.int32) * per_row,
    torch.from_dlpack(given.tables.block_tables).reshape(-1),
    torch.full((b,), t, dtype=torch.int32),
    given.q.shape[1], h, d, t, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
  )  # fmt: skip
  q = torch.from_dlpack(given.q)
  return lambda layer: wrapper.run(q, tuple(x[layer * n : (layer + 1) * n] for x in (k, v)))


def copy_bandwidth(size: int, rounds: int) -> float:
  """Bytes read and written per second by adding one to an array of `size` bytes, over and over."""
  x, times = jnp.zeros(size // 4, jnp.int32), 20
  add = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, x: x + 1, x))
  return 2 * times * x.nbytes / measure.medians({"copy": lambda: add(x)}, rounds)["copy"]


def compare(case: Case, args: argparse.Namespace, bandwidth: float) -> dict:
  """One row of the table."""
  given = data(case, args.implementation)
  iterations = max(1, min(1000, (2**20 if args.smoke else TARGET_BYTES) // case.kv_bytes))
  found = jax_contestants(case, given, iterations)
  runs = {name: many for name, (_, many) in found.items()}
  runs |= torch_contestants(case, given, iterations, found["paged"][0])
  times = {name: t / iterations for name, t in measure.medians(runs, args.rounds).items()}
  others = [t for name, t in times.items() if name != "paged"]
  share = case.kv_bytes / times["paged"] / bandwidth
  return {
    **dataclasses.asdict(case),
    "implementation": given.plan.implementation,
    **{f"{name} us": round(1e6 * t, 2) for name, t in times.items()},
    "of copy": share,
    "goal": case.goal,
    "vs best other": times["paged"] / min(others),
    "reached": share >= case.goal and times["paged"] <= min(others),
  }


def interpreted(implementation: str) -> None:
  """Lets the kernel run where there is no GPU."""
  backend = attention._BACKENDS[implementation]
  attention._BACKENDS[implementation] = types.SimpleNamespace(
    attend=functools.partial(backend.attend, interpret=True), refusal=backend.refusal
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  parser.add_argument("--rounds", type=int, default=11, help="turns of each contender")
  parser.add_argument("--implementation", help="of attention; the platform's by default")
  parser.add_argument("--smoke", action="store_true", help="tiny and interpreted, without a GPU")
  args = parser.parse_args()
  if args.smoke:
    args.rounds, args.implementation = 1, args.implementation or "gpu"
    interpreted(args.implementation)
    given, size = [Case(2, 64, 16, 4, d=64)], 2**16
  elif jax.default_backend() != "gpu":
    sys.exit("this benchmark needs an NVIDIA GPU; `--smoke` runs it without one, for no numbers")
  else:
    given, size = cases(jax.devices()[0].memory_stats()["bytes_limit"]), 2**30
  bandwidth = copy_bandwidth(size, args.rounds)
  rows = []
  for case in given:
    rows.append(compare(case, args, bandwidth))
    print(rows[-1], file=sys.stderr, flush=True)
  missed = [row for row in rows if not row["reached"]]
  summary = {
    "copy_gb_per_s": bandwidth / 1e9,
    "worst_vs_best_other": max(row["vs best other"] for row in rows),  # at most 1
    "worst_of_copy_from_32x4k": least(rows, 0.9),  # at least 0.9
    "worst_of_copy_from_8x4k": least(rows, 0.75),  # at least 0.75
    "goals_missed": len(missed),
  }
  measure.report(rows, summary, as_json=args.json)
  if missed and not args.smoke:
    sys.exit(f"{len(missed)} of {len(rows)} cases miss a goal")


def least(rows: list[dict], goal: float) -> float | None:
  return min((row["of copy"] for row in rows if row["goal"] == goal), default=None)


if __name__ == "__main__":
  main()
