"""Split-K on a GPU: how many programs share the keys of one block, and the sum of their results.

Letters as in types.py; G blocks, M = queries of a block x query heads per KV head, Z splits.
"""

import jax
import jax.numpy as jnp

H200_SMS = 132


def num_sms() -> int:
  """Multiprocessors of the GPU; of an H200 where there is none, to lower ahead of time."""
  return jax.devices()[0].core_count if jax.default_backend() == "gpu" else H200_SMS


def count(programs: int, most: int, num_sms: int) -> int:
  """The smallest number of splits, up to `most`, that fills its waves nearly as well as any."""
  if programs >= 0.8 * num_sms:
    return 1
  counts = range(1, max(1, min(most, num_sms)) + 1)
  filled = [n * programs / -(-n * programs // num_sms) for n in counts]
  return next(n for n, part in zip(counts, filled) if part >= 0.85 * max(filled))


def combine(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The output f32[...,D] and LSE f32[...] over all splits.

  Args:
    out: [Z,...,D] output over each split; 0 where it saw nothing.
    lse: f32[Z,...] its LSE; -inf where it saw nothing. Sinks belong to one split only.
  """
  total = jax.nn.logsumexp(lse, axis=0)
  weights = jnp.exp(lse - jnp.where(total == -jnp.inf, 0, total)[None])
  out = jnp.einsum("z...d,z...->...d", out.astype(jnp.float32), weights, precision="highest")
  return out, total
