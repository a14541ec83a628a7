"""A paged KV cache for JAX: one immutable pytree, and pure verbs that run inside your own program.

A verb takes a cache and a request for all rows, and returns the next cache and an `Info`. `Info.ok`
says per entry what was done; what is refused changes nothing. `help(paged_jax.extend)` shows shapes
and an example, and so for each verb.

Room for tokens
  init           an empty cache
  pages_needed   the pages that `extend` would take
  extend         room for more tokens; a shared tail page is copied first
  trim           forget tokens at the tail (rollback)
  slide          forget tokens at the head (windows)
  free           empty whole rows

A step of a model
  plan           where the tokens of one step go, once for all layers
  check_plan     raise if a token has no slot, and say why
  write          keys and values of one layer into the cache
  attend         attention of one layer over the cache
  gather         keys and values of whole rows out of the cache

Sharing
  fork           empty rows share the tokens of other rows
  reorder        rows become shares of other rows (a beam search step)
  unshare        copy shared pages, to rewrite them
  hold, drop     the host keeps a page, and gives it back
  adopt          empty rows start on pages that the host holds (a prefix hit)

Bytes out of the cache and back
  swap_out, swap_in   a row
  offload, restore    single pages, to host memory
  scrub               clear free pages

Checks
  audit          how often the laws are broken

`jitted` has the verbs compiled, with the cache donated; `sharding` places a cache on a mesh. Beside
them are `paged_jax.models`, `host` (a manager), `engine`, `server`, `viz` and `testing`.

Stable: the verbs and `CacheConfig`. Provisional: `host` and `engine`. Experimental: the kernels and
`server`. Stable names change only with a new major version, provisional ones with a new minor
version, and experimental ones at any time; the changelog lists every change.
"""

from paged_jax import jitted, sharding
from paged_jax.cache import (
  adopt,
  attend,
  audit,
  check_plan,
  drop,
  extend,
  fork,
  free,
  gather,
  hold,
  init,
  pages_needed,
  plan,
  reorder,
  scrub,
  slide,
  trim,
  unshare,
  write,
)
from paged_jax.config import CacheConfig
from paged_jax.images import offload, restore, swap_in, swap_out
from paged_jax.types import (
  Audit,
  Cache,
  Copies,
  Image,
  Info,
  Ledger,
  Log,
  Pages,
  Plan,
  Pool,
  Tables,
)

__version__ = "0.1.0"
__all__ = [
  "Audit", "Cache", "CacheConfig", "Copies", "Image", "Info", "Ledger", "Log", "Pages", "Plan",
  "Pool", "Tables", "adopt", "attend", "audit", "check_plan", "drop", "extend", "fork", "free",
  "gather", "hold", "init", "jitted", "offload", "pages_needed", "plan", "reorder", "restore",
  "scrub", "sharding", "slide", "swap_in", "swap_out", "trim", "unshare", "write",
]  # fmt: skip
