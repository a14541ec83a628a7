"""Paged attention: one meaning (`reference`), several backends. Experimental: the kernels."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from paged_jax import arguments, meshes
from paged_jax import pages as pages_lib
from paged_jax.attention import backend as backend_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import options as options_lib
from paged_jax.attention import proof
from paged_jax.attention.backend import Backend as Backend
from paged_jax.attention.options import Options as Options
from paged_jax.attention.proof import Report as Report
from paged_jax.attention.softmax import merge as merge
from paged_jax.config import CacheConfig
from paged_jax.types import Pages, Part, Plan, Tables

_KERNELS = {"tpu": ("tpu",), "gpu": ("hopper", "gpu")}  # of each platform, best first

implementations = ("reference", "xla", "tpu", "gpu", "hopper")


def choose(implementation: str | None, pages: Pages, pages_per_row: int) -> str:
  """The backend to use: the one named, or for None the best that the platform has for the cache.

  Raises:
    ValueError: There is no backend of that name.
    NotImplementedError: The one named cannot serve the cache. No other is taken in its place.
  """
  if implementation is None:
    return candidates(pages, pages_per_row)[0]
  if implementation not in implementations:
    raise ValueError(
      f"implementation must be one of {', '.join(implementations)}, got {implementation!r}"
    )
  if why := refusal(implementation, pages, pages_per_row):
    raise NotImplementedError(f"implementation {implementation!r} cannot serve this cache: {why}")
  return implementation


def candidates(pages: Pages, pages_per_row: int) -> list[str]:
  """All backends that the platform has for `pages`, best first; "xla" is the last."""
  kernels = _KERNELS.get(jax.default_backend(), ())
  return [*(name for name in kernels if refusal(name, pages, pages_per_row) is None), "xla"]


def platform(implementation: str) -> str | None:
  """The platform that a backend is made for, None for all."""
  return next((name for name, kernels in _KERNELS.items() if implementation in kernels), None)


def refusal(implementation: str, pages: Pages, pages_per_row: int) -> str | None:
  """Why a backend cannot serve a cache of `pages`, as many per row; None if it can."""
  try:
    backend = _backend(implementation)
  except ImportError as error:  # this jax was built without it, or has it no more
    return str(error)
  return backend.refusal(pages, pages_per_row)


def _backend(implementation: str) -> Backend:
  """A backend, its module imported when first asked for: kernels bring their compilers along."""
  return importlib.import_module(f"paged_jax.attention.{implementation}").BACKEND


def cut(
  implementation: str,
  rows: jax.Array,
  positions: jax.Array,
  slots: jax.Array,
  live: jax.Array,
  pages: Pages,
  tables: Tables,
  parts: Sequence[tuple[int, ...]] | None,
) -> tuple[Part, ...]:
  """Cuts a ragged batch into parts, and each into the blocks that the backend takes.

  Args:
    implementation: The backend.
    rows: i32[B] row of each token, each row in one piece; S is padding, anywhere between.
    positions: i32[B] its position.
    slots: i32[B] its slot, all distinct; out of range where it has none.
    live: bool[B] whether it attends to anything; the others of its row are still in its blocks.
    pages: What is written.
    tables: Where rows start.
    parts: See `paged_jax.plan`.
  """
  backend, num_rows, b = _backend(implementation), tables.lengths.shape[0], rows.shape[0]
  if parts is None:
    parts = ((b, num_rows, 1 if b <= num_rows else b),)  # rows that decode, or else prompts
  starts = tables.starts.at[rows].get(mode="fill", fill_value=0)
  last = jnp.where(live, positions, -1)
  made, begin = [], 0
  for num_tokens, most, longest in arguments.parts(parts, b):
    part = slice(begin, begin + num_tokens)
    size = backend.block_size(num_tokens, min(most, num_rows), longest)
    if pages.value_dim is not None:
      size = min(size, backend_lib.MAX_SHARED_BLOCK_SIZE)
    each = rows[part], starts[part], last[part]
    blocks = blocks_lib.schedule(*each, num_rows, most, size)
    made.append(Part(*each, blocks, backend.windows(pages, slots[part], size), size))
    begin += num_tokens
  return tuple(made)


def attend(
  q: jax.Array,
  pages: Pages,
  layer: int | jax.Array,
  tables: Tables,
  plan: Plan,
  *,
  scale: float | jax.Array | None = None,
  window: int | jax.Array | None = None,
  softcap: float | jax.Array | None = None,
  sinks: jax.Array | None = None,
  lse: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """Attention of the plan's tokens over their rows' pages.

  The token at position i of row r sees the positions max(starts[r], i - window + 1) <= j <= i.
  Query head q uses KV head q // (Q//H). Logits, statistics and sums are float32.

  Args:
    q: [B,Q,D] queries.
    pages: The page array.
    layer: Which layer, a Python int or i32[].
    tables: Which pages hold which tokens.
    plan: The ragged batch.
    scale: Factor of the logits, D**-0.5 by default.
    window: Tokens that a query sees, itself included; the largest int32 means all.
    softcap: Logits become softcap * tanh(logits / softcap).
    sinks: f32[Q] a logit per head that takes part in the softmax and carries no value.
    lse: Whether the LSE is wanted.

  Returns:
    [B,Q,D] in q's dtype and the LSE f32[B,Q]; 0 and -inf for padding and tokens not ok. None in
    place of an LSE that is not wanted. With a `value_dim` the output is that wide.

  Raises:
    ValueError: An argument has a wrong shape or dtype, or a static value out of range.
  """
  _, num_layers, h, _, _ = pages_lib.sizes(pages)
  q = arguments.floats("q", q, (plan.rows.shape[0], None, pages.head_dim))
  if q.shape[1] % h:
    where = f"{h} heads"
    if pages.split is not None:
      where += f" ({pages_lib.num_kv_heads(pages)} KV heads on {pages.split.ways} devices)"
    raise ValueError(f"q must have a multiple of {where}, got {q.shape[1]}")
  options = options_lib.make(q, scale=scale, window=window, softcap=softcap, sinks=sinks, lse=lse)
  backend, layer = _backend(plan.implementation), arguments.layer(layer, num_layers)
  made, begin = [], 0
  for part in plan.parts:
    end = begin + part.rows.shape[0]
    made.append(_on_heads(backend, q[begin:end], pages, layer, tables, part, options))
    begin = end
  return jax.tree.map(lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x), *made)


def _on_heads(backend, q, pages, layer, tables, part, options):
  """`_attend`, on each device's heads if pages are split."""
  split = pages.split
  if split is None:
    return _attend(backend, q, pages, layer, tables, part, options)
  heads, whole = split.spec(1), PartitionSpec()
  q = meshes.place(q, split.mesh, heads)
  specs = jax.tree.map(lambda _: whole, options)
  if options.sinks is not None:
    options = dataclasses.replace(
      options, sinks=meshes.place(options.sinks, split.mesh, split.spec(0))
    )
    specs = dataclasses.replace(specs, sinks=split.spec(0))
  run = meshes.on_each(
    split, functools.partial(_attend, backend),
    in_specs=(heads, split.spec(2), whole, whole, whole, specs),
    out_specs=(heads, heads if options.lse else None),
  )  # fmt: skip
  return run(q, dataclasses.replace(pages, split=None), layer, tables, part, options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(backend: Backend, q, pages, layer, tables, part, options):
  if backend.as_stored:
    q = pages_lib.padded(q, pages)
  out, lse = backend.attend(q, pages, layer, tables, part, options)
  return pages_lib.cropped(out, pages), lse if options.lse else None


@_differentiable.defjvp
def _attend_jvp(backend, primals, tangents):
  """Derivatives are those of the reference, whatever computes the values."""
  reference = functools.partial(_differentiable.fun, _backend("reference"))
  _, tangent = jax.jvp(reference, primals, tangents)
  return _differentiable(backend, *primals), tangent


# Compiled on its own, so that all layers of an unrolled model are traced and lowered once.
_attend = jax.jit(_differentiable, static_argnums=0)


@jax.custom_jvp
def write(pages: Pages, layer: jax.Array, k: jax.Array, v: jax.Array | None, plan: Plan) -> Pages:
  """Writes the plan's keys and values [B,H,D]; `v` is None if pages hold keys only.

  By XLA's scatter; on TPU, where it would copy the pool, by our kernel.
  """
  k, v = pages_lib.repeated(k, pages), None if v is None else pages_lib.repeated(v, pages)
  run, split = _backend(plan.implementation).write, pages.split
  if split is None:
    return run(pages, layer, k, v, plan)
  heads, whole = split.spec(1), PartitionSpec()
  run = meshes.on_each(
    split, run, in_specs=(split.spec(2), whole, heads, heads, whole), out_specs=split.spec(2)
  )
  k, v = meshes.place((k, v), split.mesh, heads)
  pages = run(dataclasses.replace(pages, split=None), layer, k, v, plan)
  return dataclasses.replace(pages, split=split)


@write.defjvp
def _write_jvp(primals, tangents):
  """Tangents are written as values are."""
  pages, layer, *_, plan = primals
  pages_lib.check_differentiable(pages)
  moved, _, k, v, _ = tangents
  k, v = pages_lib.repeated(k, pages), None if v is None else pages_lib.repeated(v, pages)
  return write(*primals), pages_lib.write(moved, layer, k, v, plan.slots)


def verify(
  implementation: str | None = None,
  config: CacheConfig | None = None,
  *,
  num_heads: int | None = None,
  memory_bytes: int = 2**29,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
  """Proves on this device that a backend is right, or shows where it is not. Slow: it compiles.

  Cases of every kind run once: rows that decode, prompts, both in parts, drafts, windows, softcap,
  sinks. Outputs are compared with the definition in float64 on the host, pages with what the write
  must make of them. Then a decode step is timed against a copy.

  Args:
    implementation: The backend; None takes the one that `plan` would.
    config: The cache whose pages are meant: KV heads, head dim, page size, dtypes. Default: 8 heads
      of 128, 16 tokens per page, bfloat16.
    num_heads: Query heads, by default 4 per KV head. 1 and 8 per KV head are tried in any case.
    memory_bytes: Most that the timed step may take. The cases take 34 MB for 8
      KV heads of 128 in 16 bits.
    progress: Called with how many of how many runs are done.

  Raises:
    ValueError: There is no such backend, or `num_heads` is not a multiple of the KV heads.
    NotImplementedError: The backend asked for cannot serve such pages.

  >>> import paged_jax
  >>> from paged_jax import attention
  >>> config = paged_jax.CacheConfig(num_kv_heads=1, head_dim=4, page_size=8, dtype="float32")
  >>> report = attention.verify("xla", config, memory_bytes=2**20)
  >>> report.ok, len(report.checks)
  (True, 12)
  """
  config = CacheConfig(num_kv_heads=8) if config is None else config
  config = config.stored_for(jax.default_backend())
  num_heads = 4 * config.num_kv_heads if num_heads is None else num_heads
  if num_heads < 1 or num_heads % config.num_kv_heads:
    raise ValueError(f"num_heads must be a multiple of {config.num_kv_heads}, got {num_heads}")
  pages = jax.eval_shape(functools.partial(pages_lib.init, config))
  implementation = choose(implementation, pages, config.pages_per_row)
  step = functools.partial(_layer, implementation)
  return proof.prove(implementation, step, config, num_heads, memory_bytes, progress)


def _layer(implementation: str, pages, layer, q, k, v, tables, tokens, parts, **options):
  """A layer's write and attention, as in a step; see `proof.Step`."""
  rows, positions, slots, ok = tokens
  live = ok & (rows < tables.lengths.shape[0])
  made = cut(implementation, rows, positions, slots, live, pages, tables, parts)
  plan = Plan(rows, positions, slots, ok, made, implementation=implementation)
  pages = write(pages, layer, k, v, plan)
  return pages, *attend(q, pages, layer, tables, plan, **options)
