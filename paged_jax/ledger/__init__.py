"""The ledger: all integers of a cache, which say who holds which page. It has no bytes.

Two backends have the same verbs: functions of arrays for a device, and `HostLedger` in NumPy.
"""

from paged_jax.ledger.growing import extend as extend
from paged_jax.ledger.growing import pages_needed as pages_needed
from paged_jax.ledger.growing import take_held as take_held
from paged_jax.ledger.growing import unshare as unshare
from paged_jax.ledger.laws import audit as audit
from paged_jax.ledger.log import replay as replay
from paged_jax.ledger.on_host import HostLedger as HostLedger
from paged_jax.ledger.verbs import adopt as adopt
from paged_jax.ledger.verbs import drop as drop
from paged_jax.ledger.verbs import each as each
from paged_jax.ledger.verbs import fork as fork
from paged_jax.ledger.verbs import free as free
from paged_jax.ledger.verbs import hold as hold
from paged_jax.ledger.verbs import init as init
from paged_jax.ledger.verbs import reorder as reorder
from paged_jax.ledger.verbs import slide as slide
from paged_jax.ledger.verbs import trim as trim

__all__ = [
  "HostLedger", "adopt", "audit", "drop", "each", "extend", "fork", "free", "hold", "init",
  "pages_needed", "reorder", "replay", "slide", "take_held", "trim", "unshare",
]  # fmt: skip
