"""Paged attention: one meaning (`reference`), several backends. Experimental: the kernels."""

import functools
import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from paged_jax import arguments
from paged_jax import pages as pages_lib
from paged_jax.attention import blocks as blocks_lib
from paged_jax.attention import options as options_lib
from paged_jax.attention.backend import FEW as FEW
from paged_jax.attention.backend import Backend as Backend
from paged_jax.attention.options import Options as Options
from paged_jax.attention.softmax import merge as merge
from paged_jax.types import Pages, Part, Plan, Tables

_KERNELS = {"tpu": ("tpu",), "gpu": ("hopper", "gpu")}  # of each platform, best first

implementations = ("reference", "xla", "tpu", "gpu", "hopper")


def choose(implementation: str | None, pages: Pages) -> str:
  """The backend to use: the one named, or for None the best that the platform has for `pages`.

  Raises:
    ValueError: There is no backend of that name.
    NotImplementedError: The one named cannot serve `pages`. No other is taken in its place.
  """
  if implementation is None:
    kernels = _KERNELS.get(jax.default_backend(), ())
    return next((name for name in kernels if refusal(name, pages) is None), "xla")
  if implementation not in implementations:
    raise ValueError(
      f"implementation must be one of {', '.join(implementations)}, got {implementation!r}"
    )
  if why := refusal(implementation, pages):
    raise NotImplementedError(f"implementation {implementation!r} cannot serve this cache: {why}")
  return implementation


def platform(implementation: str) -> str | None:
  """The platform that a backend is made for, None for all."""
  return next((name for name, kernels in _KERNELS.items() if implementation in kernels), None)


def refusal(implementation: str, pages: Pages) -> str | None:
  """Why a backend cannot serve `pages`, None if it can."""
  try:
    backend = _backend(implementation)
  except ImportError as error:  # this jax was built without it, or has it no more
    return str(error)
  return backend.refusal(pages)


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
  parts: Sequence[tuple[int, int]] | None,
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
    parts: Tokens and most rows of each part, all tokens in order; static. None: one part.
  """
  backend, num_rows, few = _backend(implementation), tables.lengths.shape[0], FEW
  if parts is None:
    parts, few = ((rows.shape[0], num_rows),), 1  # rows that decode, or else prompts
  starts = tables.starts.at[rows].get(mode="fill", fill_value=0)
  last = jnp.where(live, positions, -1)
  made, begin = [], 0
  for num_tokens, most in parts:
    part = slice(begin, begin + num_tokens)
    size = backend.block_size(num_tokens, min(most, num_rows), few)
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
    place of an LSE that is not wanted.

  Raises:
    ValueError: An argument has a wrong shape or dtype, or a static value out of range.
  """
  _, num_layers, h, _, d = pages_lib.sizes(pages)
  q = arguments.floats("q", q, (plan.rows.shape[0], None, d))
  if q.shape[1] % h:
    raise ValueError(f"q must have a multiple of {h} heads, got {q.shape[1]}")
  options = options_lib.make(q, scale=scale, window=window, softcap=softcap, sinks=sinks, lse=lse)
  backend, layer = _backend(plan.implementation), arguments.layer(layer, num_layers)
  made, begin = [], 0
  for part in plan.parts:
    end = begin + part.rows.shape[0]
    made.append(_attend(backend, q[begin:end], pages, layer, tables, part, options))
    begin = end
  return jax.tree.map(lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x), *made)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(backend: Backend, q, pages, layer, tables, part, options):
  out, found = backend.attend(q, pages, layer, tables, part, options)
  return out, found if options.lse else None


@_differentiable.defjvp
def _attend_jvp(backend, primals, tangents):
  """Derivatives are those of the reference, whatever computes the values."""
  reference = functools.partial(_differentiable.fun, _backend("reference"))
  _, tangent = jax.jvp(reference, primals, tangents)
  return _differentiable(backend, *primals), tangent


# Compiled on its own, so that all layers of an unrolled model are traced and lowered once.
_attend = jax.jit(_differentiable, static_argnums=0)


@jax.custom_jvp
def write(pages: Pages, layer: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> Pages:
  """Writes the plan's keys and values [B,H,D].

  By XLA's scatter; on TPU, where it would copy the pool, by our kernel.
  """
  return _backend(plan.implementation).write(pages, layer, k, v, plan)


@write.defjvp
def _write_jvp(primals, tangents):
  """Tangents are written as values are."""
  pages, layer, *_, plan = primals
  pages_lib.check_differentiable(pages)
  moved, _, k, v, _ = tangents
  return write(*primals), pages_lib.write(moved, layer, k, v, plan.slots)
