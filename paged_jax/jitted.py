"""The verbs, compiled, with the cache donated: use the cache that is returned, the old one is gone.

>>> import jax.numpy as jnp, paged_jax as pj
>>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
>>> cache = pj.jitted.init(config)
>>> cache, info = pj.jitted.extend(cache, jnp.array([6, 3]))
>>> int(info.num_free)
5

A verb that only reads (`pages_needed`, `plan`, `attend`, `gather`, `offload`, `audit`) donates
nothing. `check_plan` has no compiled form.
"""

import functools
import types

import jax

from paged_jax import cache as cache_lib
from paged_jax import images
from paged_jax import ledger as ledger_lib


def _compiled(verb, *, donate: bool = False, static: tuple[str, ...] = ()):
  """`verb` under `jit`, with a plain error if the cache was donated to an earlier call."""
  run = jax.jit(verb, donate_argnums=0 if donate else (), static_argnames=static)

  @functools.wraps(verb)
  def call(*args, **kwargs):
    try:
      return run(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
      leaves = jax.tree.leaves((args, kwargs))
      if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise ValueError(
          f"{verb.__name__}: this cache was donated to an earlier call; use the one it returned"
        ) from error
      raise

  return call


init = jax.jit(cache_lib.init, static_argnames="config")

extend = _compiled(cache_lib.extend, donate=True)
write = _compiled(cache_lib.write, donate=True)
fork = _compiled(cache_lib.fork, donate=True)
reorder = _compiled(cache_lib.reorder, donate=True)
unshare = _compiled(cache_lib.unshare, donate=True)
trim = _compiled(cache_lib.trim, donate=True)
slide = _compiled(cache_lib.slide, donate=True)
free = _compiled(cache_lib.free, donate=True)
hold = _compiled(cache_lib.hold, donate=True)
drop = _compiled(cache_lib.drop, donate=True)
adopt = _compiled(cache_lib.adopt, donate=True)
restore = _compiled(images.restore, donate=True)
scrub = _compiled(cache_lib.scrub, donate=True)
swap_out = _compiled(images.swap_out, donate=True, static=("num_pages",))
swap_in = _compiled(images.swap_in, donate=True)

pages_needed = _compiled(cache_lib.pages_needed)
plan = _compiled(cache_lib.plan, static=("implementation", "parts"))
attend = _compiled(cache_lib.attend, static=("softcap", "return_lse"))
gather = _compiled(cache_lib.gather, static=("num_tokens",))
offload = _compiled(images.offload)
audit = _compiled(cache_lib.audit)

# The same decisions on a ledger alone. It is not donated, so a caller can look at the result first.
ledger = types.SimpleNamespace(
  **{
    name: jax.jit(getattr(ledger_lib, name))
    for name in ("pages_needed", "extend", "fork", "reorder", "unshare", "trim", "slide", "free",
                 "hold", "drop", "adopt", "replay", "audit")
  },
  init=jax.jit(ledger_lib.init, static_argnames="config"),
  take_held=jax.jit(ledger_lib.take_held, static_argnames="size"),
)  # fmt: skip
