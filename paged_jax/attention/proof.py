"""Whether a backend is right on this device: the essential cases, run once, judged in float64.

Each case writes the keys and values of its queries and attends, as a layer of a step does. Before,
there is NaN where they go, and in every other place without a live token:

    # pages before   [k k k k][k k ? ?]      ? = NaN: free, of another layer, beyond the length, ...
    # pages after    [k k k k][k k q ?]      q = the query's own key, seen by its attention

So one run shows wrong outputs, wrong or missing writes, stale memory that is read, and copies.
"""

import dataclasses
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import pages as pages_lib
from paged_jax.attention import cases
from paged_jax.config import CacheConfig
from paged_jax.types import Pages, Tables

# Allowed errors of outputs and of the LSE, relative to 1 + the value. In float32 more than the tests
# allow on a CPU, because accelerators approximate exponentials. The LSE is float32 for all dtypes.
TOLERANCES = {"float32": (1e-4, 1e-4), "float16": (2e-3, 2e-3), "bfloat16": (1e-2, 2e-3)}
NUM_ROWS, NUM_TOKENS = 32, 2048  # of the step that is timed, if they fit
REPEATS = 16  # of it in one program: less than that, and a call's own time would count

# (pages, layer i32[], q, k, v, tables, (rows, positions, slots, ok), parts, **options)
# -> the next pages, output and LSE; `parts` is static
Step = Callable[..., tuple[Pages, jax.Array, jax.Array | None]]


class Check(NamedTuple):
  """What came of one case."""

  name: str
  output: float  # greatest error, relative to 1 + the value; NaN: memory without a token was read
  lse: float  # the same of the LSE
  wrong_values: int  # in the pages after the write
  in_place: bool  # the new pages are where the old ones were
  failure: str = ""  # why it did not run

  def faults(self, tolerances: tuple[float, float]) -> list[str]:
    """What is wrong, in words; nothing if all agrees."""
    if self.failure:
      return [self.failure]
    found = []
    for name, error, allowed in zip(("output", "LSE"), (self.output, self.lse), tolerances):
      if np.isnan(error):
        found.append(f"{name} is NaN: memory that holds no token was read")
      elif error > allowed:
        found.append(f"{name} differs by {error:.1e}")
    if self.wrong_values:
      found.append(f"{self.wrong_values} values of the pages are wrong after the write")
    if not self.in_place:
      found.append("the pages were copied")
    return found


class Timing(NamedTuple):
  """A decode step of one layer, and a copy."""

  num_rows: int
  num_tokens: int  # of each row
  num_bytes: int  # of their keys and values, which are all of the pages
  seconds: float  # of a step
  copied_bytes_per_second: float  # read and written by a copy
  temporary_bytes: int  # that the step's program takes beside its arguments
  peak_growth: int | None  # of the device's memory while it ran, None: not reported
  in_place: bool

  @property
  def share(self) -> float:
    """The step's bandwidth over that of a copy."""
    return self.num_bytes / self.seconds / self.copied_bytes_per_second

  @property
  def copies(self) -> bool:
    """Whether the step copies the pages: a copy may well end where they were, but takes memory."""
    extra = max(self.temporary_bytes, self.peak_growth or 0)
    return not self.in_place or 2 * extra > self.num_bytes

  def __str__(self) -> str:
    grown = "not reported" if self.peak_growth is None else f"{self.peak_growth / 1e6:,.1f} MB more"
    return (
      f"decode step of {self.num_rows} rows x {self.num_tokens:,} tokens, one layer:"
      f" {self.seconds * 1e3:.3f} ms, {self.num_bytes / self.seconds / 1e9:,.1f} GB/s\n"
      f"a copy: {self.copied_bytes_per_second / 1e9:,.1f} GB/s, read and written;"
      f" the step reaches {self.share:.0%} of it\n"
      f"memory: pages {self.num_bytes / 1e6:,.1f} MB, temporary {self.temporary_bytes / 1e6:,.1f} MB,"
      f" peak of the device {grown}"
    )


@dataclasses.dataclass(frozen=True)
class Report:
  """Whether a backend is right on this device; `str(report)` is a table for people."""

  implementation: str
  config: CacheConfig  # whose pages it was about
  num_heads: int
  checks: tuple[Check, ...]
  timing: Timing | str  # or why there is none

  @property
  def tolerances(self) -> tuple[float, float]:
    """Allowed errors of outputs and of the LSE."""
    dtype = np.dtype(self.config.dtype).name
    return TOLERANCES["bfloat16" if self.config.num_scales else dtype]

  @property
  def faults(self) -> list[str]:
    """What is wrong, in words; nothing if the backend is right."""
    wrong = sum(bool(check.faults(self.tolerances)) for check in self.checks)
    found = [f"{wrong} of {len(self.checks)} cases disagree"] if wrong else []
    if isinstance(self.timing, str):
      return [*found, "the decode step failed"]
    return [*found, "the decode step copies the pages"] if self.timing.copies else found

  @property
  def ok(self) -> bool:
    """Whether every case agrees, and every write is in place."""
    return not self.faults

  def __str__(self) -> str:
    wide = max(len(check.name) for check in self.checks)
    config, tolerances = self.config, self.tolerances
    shared = "" if config.value_dim is None else f" ({config.value_dim} of them values)"
    lines = [
      *(f"{name}: {value}" for name, value in where().items()),
      f"attention: {self.implementation}, {self.num_heads} query heads over {config.num_kv_heads};"
      f" pages of {config.page_size} x {config.head_dim}{shared}, {config.dtype} kept as"
      f" {config.array_dtype}",
      "",
      f"{'case':{wide}}  {'output':>7}  {'LSE':>7}",
      f"{'allowed error':{wide}}  {tolerances[0]:>7.1e}  {tolerances[1]:>7.1e}",
    ]
    for check in self.checks:
      verdict = "; ".join(check.faults(tolerances)) or "ok"
      errors = "  ".join(
        f"{'-' if check.failure else f'{x:.1e}':>7}" for x in (check.output, check.lse)
      )
      lines.append(f"{check.name:{wide}}  {errors}  {verdict}")
    verdict = f"WRONG: {', '.join(self.faults)}" if self.faults else "all cases agree, in place"
    return "\n".join([*lines, "", str(self.timing), "", verdict])


def where() -> dict[str, str]:
  """The device, and all versions that what it computes depends on."""
  device = jax.devices()[0]
  names = ("paged_jax", "jax", "jaxlib")
  return {
    "device": f"{device.device_kind}, {device.platform}",
    "runtime": " ".join(device.client.platform_version.split()),
    "versions": ", ".join(f"{name} {metadata.version(name)}" for name in names),
  }


def prove(
  implementation: str,
  step: Step,
  config: CacheConfig,
  num_heads: int,
  memory_bytes: int,
  progress: Callable[[int, int], None],
) -> Report:
  """Runs the essential cases and a timed step; see `attention.verify`."""
  wanted, checks = list(cases.essential(config, num_heads)), []
  for case in wanted:
    progress(len(checks), len(wanted) + 1)
    try:
      checks.append(_check(step, case))
    except Exception as error:  # compilers and devices have errors of any kind
      checks.append(Check(case.name, np.nan, np.nan, 0, True, _failure(error)))
  progress(len(wanted), len(wanted) + 1)
  try:
    timing = _time(step, config, num_heads, memory_bytes)
  except Exception as error:
    timing = f"decode step: {_failure(error)}"
  progress(len(wanted) + 1, len(wanted) + 1)
  return Report(implementation, config, num_heads, tuple(checks), timing)


def _failure(error: Exception) -> str:
  first = str(error).strip().partition("\n")[0]
  return f"failed: {type(error).__name__}: {first[:200]}"


def _check(step: Step, case: cases.Case) -> Check:
  """Runs a case, and compares."""
  problem = cases.build(case)
  n, _, _, t, _ = problem.kv.shape
  live = problem.slots < n * t
  at = problem.slots[live] // t, cases.LAYER, slice(None), problem.slots[live] % t
  want = cases.read(problem.kv, problem.scales, case.dtype)
  d, stored = case.head_dim, case.storage_head_dim
  k = np.full((len(live), case.num_kv_heads, d), 7, want.dtype)  # 7 goes nowhere
  v = k.copy() if case.value_dim is None else None
  k[live] = want[at][..., :d]
  if v is not None:
    v[live] = want[at][..., stored : stored + d]
  pages = _before(case, problem, at)
  options: dict[str, Any] = {
    name: None if value is None else np.float32(value)
    for name, value in (("scale", case.scale), ("softcap", case.softcap), ("sinks", problem.sinks))
  }
  if case.window is not None:
    options["window"] = np.int32(case.window)
  args = (
    pages,
    np.int32(cases.LAYER),
    problem.q,
    k,
    v,
    _tables(problem.block_tables, problem.starts, problem.lengths),
    (problem.rows, problem.positions, problem.slots, problem.ok),
  )
  places = _places(pages)
  run = jax.jit(step, static_argnames="parts", donate_argnums=0)
  pages, out, lse = run(*args, parts=case.parts, **options)
  scales = None if pages.scales is None else np.asarray(pages.scales)
  after = cases.read(np.asarray(pages.kv), scales, case.dtype)
  same = (after == want) | (np.isnan(after) & np.isnan(want))
  if problem.scales is not None:  # devices may divide inexactly
    same |= np.isclose(after, want, rtol=1e-5, atol=0)
  want_out, want_lse = cases.dense(case, problem)
  return Check(
    name=case.name,
    output=_error(out, want_out),
    lse=_error(lse, want_lse),
    wrong_values=int((~same).sum()),
    in_place=_places(pages) == places,
  )


def _places(pages: Pages) -> list[int]:
  """Where its arrays are in the device's memory."""
  return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(pages)]


def _before(case: cases.Case, problem: cases.Problem, at: tuple) -> Pages:
  """The pages on the device, with NaN in the places `at` which the step writes.

  Copies, made by the device: memory that NumPy has, too, would never be donated.
  """
  kv, scales = problem.kv.view(case.dtype).copy(), problem.scales
  if scales is None:
    kv[at] = np.nan
  else:
    scales = scales.copy()
    scales[at] = np.nan
    scales = jnp.copy(jax.device_put(scales))
  kv = jnp.copy(jax.device_put(kv.view(problem.kv.dtype)))
  return Pages(kv, np.dtype(case.dtype), case.head_dim, case.value_dim, scales)


def _error(values: jax.Array, want: np.ndarray) -> float:
  """The greatest error relative to 1 + the value; NaN if any is."""
  got = np.asarray(values).astype(np.float64)
  same, finite = got == want, np.isfinite(want)  # an infinity may be right
  error = np.abs(np.where(same, 0, got) - np.where(same, 0, want))
  return float(np.max(error / (1 + np.where(finite, np.abs(want), 0))))


def _time(step: Step, config: CacheConfig, num_heads: int, memory_bytes: int) -> Timing:
  """Times a decode step of one layer against a copy of as many bytes as its rows have."""
  t, h, d = config.page_size, config.num_kv_heads, config.head_dim
  per_row = -(-NUM_TOKENS // t)
  row_bytes = per_row * config.page_bytes // config.num_layers
  stats = _memory()
  room = stats.get("bytes_limit", memory_bytes) - stats.get("bytes_in_use", 0)
  s = max(1, min(NUM_ROWS, min(memory_bytes, room) // (2 * row_bytes)))  # half for the copy
  sizes = dataclasses.replace(config, num_layers=1, num_pages=s * per_row, num_rows=s)
  ids = np.random.default_rng(0).permutation(s * per_row).astype(np.int32).reshape(s, per_row)
  last = np.full(s, NUM_TOKENS - 1, np.int32)
  slots = ids[:, (NUM_TOKENS - 1) // t] * t + (NUM_TOKENS - 1) % t
  tokens = (np.arange(s, dtype=np.int32), last, slots, np.ones(s, bool))
  tables = _tables(ids, np.zeros(s, np.int32), last + 1)
  dtype = jnp.bfloat16 if config.num_scales else config.dtype  # of queries
  q, k, v = (np.ones((s, heads, d), dtype) for heads in (num_heads, h, h))
  v = v if config.value_dim is None else None

  def steps(state, *args):
    def body(_, state):
      pages, q = state  # each output is part of the next query: no step can be left out
      pages, out, _ = step(pages, jnp.int32(0), q, *args, parts=None)
      return pages, jnp.concatenate([out, q[..., out.shape[-1] :]], axis=-1)

    return jax.lax.fori_loop(0, REPEATS, body, state)

  def copies(x):
    return jax.lax.fori_loop(0, REPEATS, lambda i, x: x + i.astype(jnp.float32), x)

  pages = jax.jit(pages_lib.init, static_argnums=0)(sizes)
  num_bytes, places = sum(x.nbytes for x in jax.tree.leaves(pages)), _places(pages)
  q, *args = jax.device_put((q, k, v, tables, tokens))
  program = jax.jit(steps, donate_argnums=0).lower((pages, q), *args).compile()
  analysis, before = program.memory_analysis(), _memory().get("peak_bytes_in_use")
  seconds, (pages, _) = _fastest(program, (pages, q), *args)
  after, in_place = _memory().get("peak_bytes_in_use"), _places(pages) == places
  del pages  # makes room
  x = jnp.zeros(num_bytes // 4, jnp.float32)
  copied, _ = _fastest(jax.jit(copies, donate_argnums=0).lower(x).compile(), x)
  return Timing(
    num_rows=s,
    num_tokens=NUM_TOKENS,
    num_bytes=num_bytes,
    seconds=seconds,
    copied_bytes_per_second=2 * num_bytes / copied,
    temporary_bytes=0 if analysis is None else analysis.temp_size_in_bytes,
    peak_growth=None if before is None or after is None else after - before,
    in_place=in_place,
  )


def _fastest(program: Callable, state: Any, *args) -> tuple[float, Any]:
  """Seconds of one of the REPEATS of a program that takes its state and gives the next one; the
  least of three calls."""
  seconds = []
  for _ in range(4):  # the first one does not count
    began = time.perf_counter()
    state = jax.block_until_ready(program(state, *args))
    seconds.append(time.perf_counter() - began)
  return min(seconds[1:]) / REPEATS, state


def _tables(block_tables: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Tables:
  """On the device, no row stale."""
  arrays = (block_tables, starts, lengths, np.zeros(len(lengths), bool))
  return Tables(*map(jax.device_put, arrays))


def _memory() -> dict[str, int]:
  """What the device says of its memory; nothing if it says nothing."""
  return jax.devices()[0].memory_stats() or {}
