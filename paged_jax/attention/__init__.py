"""Paged attention: one meaning (`reference`), several backends. Experimental: the kernels."""

import functools
import importlib

import jax
import jax.numpy as jnp

from paged_jax import arguments
from paged_jax import pages as pages_lib
from paged_jax.attention import options as options_lib
from paged_jax.attention.backend import Backend as Backend
from paged_jax.attention.options import Options as Options
from paged_jax.attention.softmax import merge as merge
from paged_jax.types import Pages, Plan, Tables

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


def block_size(implementation: str, num_tokens: int, num_rows: int) -> int:
  """Most tokens in a block of queries."""
  return _backend(implementation).block_size(num_tokens, num_rows)


def schedule(rows: jax.Array, num_rows: int, block_size: int) -> tuple[jax.Array, jax.Array]:
  """Cuts a ragged batch into blocks of queries, each of one row.

  Args:
    rows: i32[B] row of each token, each row in one piece; `num_rows` is padding, anywhere between.
    num_rows: S, a static number.
    block_size: Most tokens in a block, a static number.

  Returns:
    The first token of each block i32[G], and its number of tokens i32[G]. Spare blocks start at B
    and have no token.
  """
  b = rows.shape[0]
  num_blocks = (b + min(num_rows, b) * (block_size - 1)) // block_size
  tokens = jnp.arange(b, dtype=jnp.int32)
  fresh = jnp.pad(rows[1:] != rows[:-1], (1, 0), constant_values=True)
  nth = tokens - jax.lax.cummax(jnp.where(fresh, tokens, 0))  # number of each token in its row
  known = (rows >= 0) & (rows < num_rows)
  leads = known & (nth % block_size == 0)
  owner = jnp.where(known, jnp.cumsum(leads, dtype=jnp.int32) - 1, num_blocks)
  leader = jnp.where(leads, owner, num_blocks)
  blocks = jnp.full(num_blocks, b, jnp.int32).at[leader].set(tokens, mode="drop")
  lengths = jnp.zeros(num_blocks, jnp.int32).at[owner].add(1, mode="drop")
  return blocks, lengths


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
) -> tuple[jax.Array, jax.Array]:
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

  Returns:
    [B,Q,D] in q's dtype and the LSE f32[B,Q]; 0 and -inf for padding and tokens not ok.

  Raises:
    ValueError: An argument has a wrong shape or dtype, or a static value out of range.
  """
  _, num_layers, h, _, d = pages_lib.sizes(pages)
  q = arguments.floats("q", q, (plan.rows.shape[0], None, d))
  if q.shape[1] % h:
    raise ValueError(f"q must have a multiple of {h} heads, got {q.shape[1]}")
  options = options_lib.make(q, scale=scale, window=window, softcap=softcap, sinks=sinks)
  backend, layer = _backend(plan.implementation), arguments.layer(layer, num_layers)
  return _attend(backend, q, pages, layer, tables, plan, options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(backend: Backend, q, pages, layer, tables, plan, options):
  return backend.attend(q, pages, layer, tables, plan, options)


@_differentiable.defjvp
def _attend_jvp(backend, primals, tangents):
  """Derivatives are those of the reference, whatever computes the values."""
  _, tangent = jax.jvp(_backend("reference").attend, primals, tangents)
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
