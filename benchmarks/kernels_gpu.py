"""Does paged decode attention on a GPU run at the speed of memory, and beside whom?

Bytes of K and V per second over those of a copy measured in the same run, for our kernel, and the
time of others on the same values: jax's own Pallas kernel, a gather and `dot_product_attention`
(XLA's and cuDNN's), and, where they are installed, PyTorch's SDPA (on K and V gathered beforehand,
so without the cost of paging) and FlashInfer.

Times are of steps on the device: one program runs many of them, at least 20 ms, in a loop in which
each step's queries are the step before's output, so that nothing is hoisted, overlapped or waits
for the host, and one dispatch is under 1%. PyTorch's are captured in a CUDA graph as long. Steps
take turns over so many sets of pages that nothing is still in the L2 cache when it is read again.

Then batches as engines make them, which only our kernel takes: rows that decode beside a piece of one
prompt, attended as two parts and, to compare, as one. And pages of 8 bits, beside a gather that
dequantises, and beside our own time over pages of 16 bits.

Goals: 0.90 of the copy's bandwidth from 32 rows of 4,096 tokens upwards, 0.75 from 8 rows, nobody
faster. It fails if one is missed. `--smoke` runs tiny shapes, interpreted, on any machine.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import warnings

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
warnings.filterwarnings("ignore", "jax.experimental.pallas.ops.gpu", DeprecationWarning)

import measure  # noqa: E402  # isort: skip  # sets XLA_FLAGS, so it comes before jax
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from paged_jax import CacheConfig, attention, quantization  # noqa: E402
from paged_jax import pages as pages_lib  # noqa: E402
from paged_jax.types import Pages, Tables  # noqa: E402

SECONDS = 0.02  # of one program
CACHE_BYTES = 2**28  # more than any L2 cache
KEY_SPLITS = (1, 4, 16)  # of jax's kernel; the best counts
MIXED = ((32, 2048), (32, 8192), (32, 32_768), (256, 2048), (256, 8192), (256, 32_768))
PROMPT = 512  # tokens of a mixed batch's prompt
PROMPTS = 8  # at most, as its part is told
Parts = tuple[tuple[int, int], ...] | None
GOALS = (
  ("worst_of_copy_32_rows", ">=", 0.90),  # and 4,096 tokens or more
  ("worst_of_copy_8_rows", ">=", 0.75),
  ("worst_vs_best", "<=", 1.0),
)


@dataclasses.dataclass(frozen=True)
class Case:
  batch: int
  context: int
  page_size: int
  num_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  dtype: str = "bfloat16"
  kv_dtype: str = ""  # of pages of 8 bits, none: dtype
  smoke: bool = False

  @property
  def pages_per_row(self) -> int:
    return -(-self.context // self.page_size)

  @property
  def kv_bytes(self) -> int:
    config = CacheConfig(
      num_layers=1, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, page_size=1,
      dtype=self.kv_dtype or self.dtype,
    )  # fmt: skip
    return self.batch * self.context * config.page_bytes

  @property
  def num_sets(self) -> int:
    return 1 if self.smoke else max(1, -(-CACHE_BYTES // self.kv_bytes))

  def iterations(self, bandwidth: float) -> int:
    return 2 if self.smoke else int(SECONDS / (self.kv_bytes / bandwidth + 5e-6)) + 1


@dataclasses.dataclass(frozen=True)
class Data:
  """What all contenders get: pages, and so many disjoint sets of tables over them."""

  q: jax.Array  # [B,Q,D]
  kv: jax.Array  # [N,H,T,2D]
  scales: jax.Array | None  # f32[N,2H,T] of pages of 8 bits
  tables: jax.Array  # i32[sets,B,P]
  lengths: jax.Array  # i32[B]


def formats(implementation: str) -> list[str]:
  """The formats of 8 bits that the implementation has on this device."""
  configs = {x: CacheConfig(head_dim=128, dtype=x, num_pages=1) for x in quantization.LIMITS}
  made = {x: jax.eval_shape(lambda c=c: pages_lib.init(c)) for x, c in configs.items()}
  return [x for x, pages in made.items() if attention.refusal(implementation, pages, 1) is None]


def cases(args) -> list[Case]:
  if args.smoke:
    one = Case(1, 80, 16, 4, 2, 16, smoke=True)
    two = Case(2, 64, 16, 8, 2, 16, "float32", smoke=True)
    eight = (dataclasses.replace(one, kv_dtype=x) for x in formats(args.implementation))
    return [two, one, *eight]
  sizes = itertools.product((8, 4), (16, 64), (1, 8, 32, 128), (512, 2048, 4096, 8192, 32_768))
  if args.quick:
    sizes = itertools.product((4,), (16,), (1, 8, 32), (512, 4096))
  all_cases = [Case(b, x, t, num_kv_heads=8, num_heads=8 * repeats) for repeats, t, b, x in sizes]
  all_cases += [
    dataclasses.replace(case, kv_dtype=kv_dtype)
    for kv_dtype in formats(args.implementation)
    for case in all_cases if case.num_heads == 32 and case.context >= 2048
  ]  # fmt: skip
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**34)
  return [c for c in all_cases if 6 * max(c.kv_bytes, CACHE_BYTES) < limit]


def data(case: Case) -> Data:
  b, p, sets = case.batch, case.pages_per_row, case.num_sets
  n = sets * b * p
  shape = (n, case.num_kv_heads, case.page_size, 2 * case.head_dim)
  ids = np.random.default_rng(0).permutation(n).reshape(sets, b, p)
  q_key, kv_key = jax.random.split(jax.random.key(0))
  normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
  kv, scales = kept(case, normal(kv_key, shape, case.dtype))
  return Data(
    q=normal(q_key, (b, case.num_heads, case.head_dim), case.dtype),
    kv=kv,
    scales=scales,
    tables=jnp.asarray(ids, jnp.int32),
    lengths=jnp.full(b, case.context, jnp.int32),
  )


@functools.partial(jax.jit, static_argnums=0)
def kept(case: Case, kv: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """What pages keep of K and V [N,H,T,2D]: numbers, and scales f32[N,2H,T] of 8 bits."""
  if not case.kv_dtype:
    return kv, None
  n, h, t, _ = kv.shape
  numbers, scales = quantization.quantize(kv.reshape(n, h, t, 2, -1), case.kv_dtype)
  return numbers.reshape(kv.shape), scales.swapaxes(2, 3).reshape(n, 2 * h, t)


def read(case: Case, kv: jax.Array, scales: jax.Array | None) -> jax.Array:
  """K and V [...,H,T,2D] as `case.dtype`, of what `kept` made."""
  if scales is None:
    return kv
  each = scales.reshape(*kv.shape[:-2], 2, -1).swapaxes(-1, -2)
  numbers = kv.reshape(*kv.shape[:-1], 2, -1)
  return quantization.dequantize(numbers, each).astype(case.dtype).reshape(kv.shape)


def as_pages(case: Case, kv: jax.Array, scales: jax.Array | None) -> Pages:
  dtype = np.dtype(case.kv_dtype or case.dtype)
  scales = None if scales is None else scales[:, None]
  return Pages(kv[:, None], dtype, case.head_dim, scales=scales)


def ours(case: Case, d: Data, implementation: str, prompt: int = 0, parts: Parts = None):
  """A step of our kernel: one token of each row, or of the last row `prompt` tokens."""
  attend = importlib.import_module(f"paged_jax.attention.{implementation}").attend
  if case.smoke and implementation in ("gpu", "tpu"):
    attend = functools.partial(attend, interpret=True)
  s = d.lengths.shape[0]
  each = np.append(np.ones(s - 1, np.int32), prompt or 1)  # tokens of each row
  rows = jnp.asarray(np.repeat(np.arange(s, dtype=np.int32), each))
  nth = np.concatenate([np.arange(-count, 0, dtype=np.int32) for count in each])
  starts, stale = jnp.zeros(s, jnp.int32), jnp.zeros(s, bool)
  live = jnp.ones(rows.shape, bool)
  tables = Tables(d.tables[0], starts, d.lengths, stale)
  positions = d.lengths[rows] + nth
  slots = d.tables[0][rows, positions // case.page_size] * case.page_size
  slots += positions % case.page_size
  pages = as_pages(case, d.kv, d.scales)
  cut = attention.cut(implementation, rows, positions, slots, live, pages, tables, parts)

  def step(q, kv, table):
    tables = Tables(table, starts, d.lengths, stale)
    pages = as_pages(case, *kv)
    options, outs, begin = attention.options.make(q), [], 0
    for part in cut:
      end = begin + part.rows.shape[0]
      outs.append(attend(q[begin:end], pages, jnp.int32(0), tables, part, options)[0])
      begin = end
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs)

  return step, (d.kv, d.scales)


def gathered(case: Case, d: Data, implementation: str):
  def step(q, kv, table):
    found = read(case, *(None if x is None else x[table] for x in kv)).swapaxes(2, 3)
    found = found.reshape(case.batch, -1, case.num_kv_heads, 2 * case.head_dim)
    k, v = found[..., : case.head_dim], found[..., case.head_dim :]
    out = jax.nn.dot_product_attention(
      q[:, None], k, v, key_value_seq_lengths=d.lengths, implementation=implementation
    )
    return out[:, 0]

  return step, (d.kv, d.scales)


def pallas(case: Case, d: Data, splits: int):
  from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

  by_head = jax.jit(lambda kv: tuple(
    kv[..., part].swapaxes(0, 1)
    for part in (slice(None, case.head_dim), slice(case.head_dim, None))
  ))(d.kv)  # fmt: skip

  def step(q, kv, table):
    scaled = q * jnp.asarray(case.head_dim**-0.5, q.dtype)
    return paged_attention(scaled, *kv, table, d.lengths, k_splits=splits, interpret=case.smoke)

  return step, by_head


def contenders(case: Case, d: Data, implementation: str) -> dict:
  found = {
    "ours": lambda: ours(case, d, implementation),
    "gather + xla": lambda: gathered(case, d, "xla"),
  }
  if not case.smoke:
    found["gather + cudnn"] = lambda: gathered(case, d, "cudnn")
  if case.kv_dtype:
    return found
  if importlib.util.find_spec("jax.experimental.pallas.ops.gpu.paged_attention"):
    for splits in KEY_SPLITS:
      share, rest = divmod(case.pages_per_row, splits)
      if rest == 0 and share & (share - 1) == 0:  # others are refused
        found[f"pallas {splits}"] = functools.partial(pallas, case, d, splits)
  return found


def program(step, kv, d: Data, iterations: int):
  """Many steps as one call; the queries of each are the output of the one before."""

  @jax.jit
  def run(q, kv, tables):
    def body(i, q):
      return step(q, kv, tables[i % tables.shape[0]])

    return jax.lax.fori_loop(0, iterations, body, q, unroll=min(4, iterations))

  return lambda: run(d.q, kv, d.tables)


def torch_seconds(case: Case, d: Data, iterations: int, rounds: int) -> dict[str, float]:
  """Median seconds of a step of PyTorch's and FlashInfer's attention, those that are here."""
  if importlib.util.find_spec("torch") is None:
    return {}
  import torch

  if not torch.cuda.is_available():
    return {}
  q, kv, tables = (torch.from_dlpack(x) for x in (d.q, d.kv, d.tables))
  size, b = case.head_dim, case.batch

  def sdpa_steps():
    rows = [kv[table.long()].transpose(1, 2).reshape(b, case.num_kv_heads, -1, 2 * size)
            for table in tables]  # fmt: skip
    pairs = [(x[..., :size].contiguous(), x[..., size:].contiguous()) for x in rows]
    attend = torch.nn.functional.scaled_dot_product_attention
    return [functools.partial(attend, q[:, :, None], k, v, enable_gqa=True) for k, v in pairs]

  def flashinfer_steps():
    import flashinfer

    k, v = kv[..., :size].contiguous(), kv[..., size:].contiguous()
    steps = []
    for table in tables:
      space = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
      wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND")
      wrapper.plan(
        torch.arange(b + 1, dtype=torch.int32, device="cuda") * case.pages_per_row,
        table.reshape(-1), torch.full((b,), (case.context - 1) % case.page_size + 1,
        dtype=torch.int32, device="cuda"), case.num_heads, case.num_kv_heads, size, case.page_size,
        q_data_type=q.dtype, kv_data_type=kv.dtype,
      )  # fmt: skip
      steps.append(functools.partial(wrapper.run, q, (k, v)))
    return steps

  builders = {"torch sdpa": sdpa_steps}
  if importlib.util.find_spec("flashinfer") is not None:
    builders["flashinfer"] = flashinfer_steps
  return {
    name: _graph_seconds(torch, build(), iterations, rounds) for name, build in builders.items()
  }


def _graph_seconds(torch, steps, iterations: int, rounds: int) -> float:
  side = torch.cuda.Stream()
  with torch.cuda.stream(side):
    for step in steps:
      step()
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    for i in range(iterations):
      steps[i % len(steps)]()
  times = []
  for _ in range(rounds):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    times.append(begin.elapsed_time(end) / 1e3 / iterations)
  return float(np.median(times))


def copy_bandwidth(num_bytes: int) -> float:
  """Bytes read and written per second by a copy, many in one program."""
  x = jnp.ones(num_bytes // 4, jnp.float32)
  iterations = 16
  run = jax.jit(lambda x: jax.lax.fori_loop(0, iterations, lambda _, x: x + 1, x))
  seconds = measure.medians({"copy": lambda: run(x)}, rounds=7)["copy"]
  return 2 * x.nbytes * iterations / seconds


def compare(case: Case, bandwidth: float, args) -> dict:
  """One row of the table."""
  d = data(case)
  iterations = case.iterations(bandwidth)
  programs, want = {}, None
  for name, build in contenders(case, d, args.implementation).items():
    step, kv = build()
    try:
      out = np.asarray(jax.jit(step)(d.q, kv, d.tables[0]), np.float32)
    except (NotImplementedError, RuntimeError, ValueError) as error:
      if name == "ours":
        raise
      print(f"{name} is left out: {str(error).splitlines()[0]}")
      continue
    want = out if want is None else want
    np.testing.assert_allclose(out, want, atol=0.03, err_msg=f"{case}: {name}")
    programs[name] = program(step, kv, d, iterations)
  times = measure.medians(programs, rounds=args.rounds)
  times = {name: t / iterations for name, t in times.items()}
  times |= {} if case.smoke or case.kv_dtype else torch_seconds(case, d, iterations, args.rounds)
  tuned = [times.pop(name) for name in list(times) if name.startswith("pallas ")]
  times |= {"jax pallas": min(tuned)} if tuned else {}
  return {
    "batch": case.batch,
    "context": case.context,
    "page size": case.page_size,
    "heads": f"{case.num_heads}:{case.num_kv_heads}",
    "pages": case.kv_dtype or case.dtype,
    "of copy": case.kv_bytes / times["ours"] / bandwidth,
    "vs best": times["ours"] / min(t for name, t in times.items() if name != "ours"),
    **{f"{name} us": round(1e6 * t, 2) for name, t in times.items()},
  }


def compare_mixed(num_rows: int, context: int, bandwidth: float, args) -> dict:
  """One row of the table: rows that decode at 2,048 tokens, and the last tokens of one prompt."""
  case = Case(num_rows, 2048, 16)
  prompt = PROMPT
  if args.smoke:
    case, prompt = Case(num_rows, 64, 16, 8, 2, 16, "float32", smoke=True), 20
  size = case.page_size
  counts = np.append(np.full(num_rows, case.pages_per_row), -(-context // size))  # of pages
  n = int(counts.sum())
  tables = np.full((num_rows + 1, counts.max()), n, np.int32)
  tables[np.arange(counts.max()) < counts[:, None]] = np.random.default_rng(0).permutation(n)
  q_key, kv_key = jax.random.split(jax.random.key(0))
  normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
  d = Data(
    q=normal(q_key, (num_rows + prompt, case.num_heads, case.head_dim), case.dtype),
    kv=normal(kv_key, (n, case.num_kv_heads, size, 2 * case.head_dim), case.dtype),
    scales=None,
    tables=jnp.asarray(tables)[None],
    lengths=jnp.asarray(np.append(np.full(num_rows, case.context), context), jnp.int32),
  )
  iterations = case.iterations(bandwidth)
  ways = {"ours": ((num_rows, num_rows), (prompt, PROMPTS)), "one part": None}
  steps = {name: ours(case, d, args.implementation, prompt, parts) for name, parts in ways.items()}
  got, want = (
    np.asarray(jax.jit(step)(d.q, kv, d.tables[0]), np.float32) for step, kv in steps.values()
  )
  np.testing.assert_allclose(
    got, want, atol=0.03, err_msg=f"{num_rows} rows and a prompt of {context}"
  )
  times = measure.medians(
    {name: program(step, kv, d, iterations) for name, (step, kv) in steps.items()}, args.rounds
  )
  times = {name: t / iterations for name, t in times.items()}
  return {
    "batch": num_rows,
    "context": case.context,
    "page size": size,
    "heads": f"{case.num_heads}:{case.num_kv_heads}",
    "pages": case.dtype,
    "prompt": f"{prompt} at {context}",
    "of copy": d.kv.nbytes / times["ours"] / bandwidth,  # as if each row were read once
    **{f"{name} us": round(1e6 * t, 2) for name, t in times.items()},
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  parser.add_argument("--implementation", default="gpu", help="a module of paged_jax.attention")
  parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
  parser.add_argument("--quick", action="store_true", help="fewer cases")
  parser.add_argument("--smoke", action="store_true", help="tiny, interpreted, on any machine")
  args = parser.parse_args()
  if not args.smoke and jax.default_backend() != "gpu":
    parser.error("needs an NVIDIA GPU that jax can see; --smoke runs tiny shapes without one")
  bandwidth = copy_bandwidth(2**20 if args.smoke else 2**30)
  rows = [compare(case, bandwidth, args) for case in cases(args)]
  mixed = ((3, 70),) if args.smoke else MIXED[::3] if args.quick else MIXED
  mixed = [compare_mixed(num_rows, context, bandwidth, args) for num_rows, context in mixed]

  def place(row):
    return tuple(row[name] for name in ("batch", "context", "page size", "heads"))

  eight = [row for row in rows if row["pages"] in quantization.LIMITS]
  rows = [row for row in rows if row not in eight]  # the goals are those of 16 bits
  times = {place(row): row["ours us"] for row in rows}
  for row in eight:
    row["of 16 bits"] = row["ours us"] / times[place(row)]
  large = [row for row in rows if row["context"] >= 4096]
  summary = {
    "copy_gb_per_s": bandwidth / 1e9,
    "worst_of_copy_32_rows": min((r["of copy"] for r in large if r["batch"] >= 32), default=None),
    "worst_of_copy_8_rows": min((r["of copy"] for r in large if r["batch"] >= 8), default=None),
    "worst_vs_best": max(row["vs best"] for row in rows),
    "worst_8_of_16_bits": max((row["of 16 bits"] for row in eight), default=None),
  }
  measure.report(rows + eight + mixed, summary, as_json=args.json)
  if not args.smoke:
    missed = [
      f"{name} is {summary[name]:.3g}, not {sign} {goal}"
      for name, sign, goal in GOALS
      if summary[name] is not None and (summary[name] - goal) * (1 if sign == "<=" else -1) > 0
    ]
    if missed:
      raise SystemExit("missed: " + "; ".join(missed))
    print("all goals are met")


if __name__ == "__main__":
  main()
