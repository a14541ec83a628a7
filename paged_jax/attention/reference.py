"""What paged attention means: every token against its whole row, in float32.

Letters as in types.py; R query heads per KV head, X = P*T positions of a row.
"""

import jax
import jax.numpy as jnp

from paged_jax import pages as pages_lib
from paged_jax.attention import softmax
from paged_jax.attention.backend import Backend
from paged_jax.attention.options import Options
from paged_jax.types import Pages, Part, Tables


def attend(
  q: jax.Array,
  pages: Pages,
  layer: jax.Array,
  tables: Tables,
  part: Part,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B,Q,D] over the pages of each token's row; see `attention.attend`."""
  n, _, h, t, _ = pages_lib.sizes(pages)
  ids = tables.block_tables.at[part.rows].get(mode="fill", fill_value=n)  # [B,P]
  k, v = (x.astype(jnp.float32) for x in pages_lib.gather(pages, layer, ids))  # [B,X,H,D]

  j = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
  i, starts, live = part.last[:, None], part.starts[:, None], part.last >= 0
  seen = (j >= jnp.maximum(starts, i - options.window + 1)) & (j <= i)
  seen &= jnp.repeat(ids < n, t, axis=1)  # [B,X]

  queries = q.astype(jnp.float32).reshape(q.shape[0], h, -1, q.shape[2])
  k, v = (jnp.where(seen[:, None, :, None], x.swapaxes(1, 2), 0) for x in (k, v))  # 0 * NaN is NaN
  products = softmax.product(queries, k)
  logits = softmax.logits(products, seen[:, None, None], options.scale, options.softcap)
  logits = logits.reshape(*q.shape[:2], -1)

  lse = jax.nn.logsumexp(logits, axis=-1)
  if options.sinks is not None:
    lse = jnp.where(live[:, None], jnp.logaddexp(lse, options.sinks[None]), -jnp.inf)
  weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
  weights = weights.reshape(q.shape[0], h, -1, k.shape[2])
  out = jnp.einsum("bhrx,bhxd->bhrd", weights, v, precision="highest")
  return out.reshape(*q.shape[:2], -1).astype(q.dtype), lse


BACKEND = Backend(attend, as_stored=False)
