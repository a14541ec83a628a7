"""Split-K on a GPU: how many programs share the keys of one block, and the sum of their parts.

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


def combine(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """The output f32[G,H,M,D] and LSE f32[G,H,M,1] over all splits and the sinks.

  Args:
    out: f32[Z,G,H,M,D] output over each split; 0 where it saw nothing.
    lse: f32[Z,G,H,M,1] its LSE; -inf where it saw nothing.
    sinks: f32[Q] a logit per query head, or None.
  """
  total = jax.nn.logsumexp(lse, axis=0)
  if sinks is not None:
    _, h, m, _ = total.shape
    by_head = sinks.reshape(h, -1)
    by_query = jnp.tile(by_head, (1, m // by_head.shape[1]))
    total = jnp.logaddexp(total, by_query[None, ..., None])
  weights = jnp.exp(lse - jnp.where(total == -jnp.inf, 0, total)[None])
  return jnp.einsum("zghmd,zghmi->ghmd", out, weights, precision="highest"), total
