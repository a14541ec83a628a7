"""Replay: another ledger repeats the verbs that a program on the device reported."""

import jax

from paged_jax.ledger import growing, verbs
from paged_jax.ledger.verbs import Ledgers
from paged_jax.types import Log

VERBS = {
  "extend": growing.extend,
  "fork": verbs.fork,
  "reorder": verbs.reorder,
  "unshare": growing.unshare,
  "trim": verbs.trim,
  "slide": verbs.slide,
  "free": verbs.free,
  "hold": verbs.hold,
  "drop": verbs.drop,
  "adopt": verbs.adopt,
}


def check(log: Log) -> None:
  """Raises unless `log` names verbs of a ledger only, and each has its operands."""
  unknown = [verb for verb in log.verbs if verb not in VERBS]
  if unknown or len(log.verbs) != len(log.operands):
    raise ValueError(f"log.verbs must be of {', '.join(VERBS)}, with operands, got {log.verbs}")


def replay(ledger: Ledgers, log: Log) -> Ledgers:
  """The ledger after all verbs in `log`, bit for bit the same as that of the program.

  Several groups follow one log. Operands of `hold`, `drop` and `adopt` are then tuples.

  >>> import jax.numpy as jnp, paged_jax
  >>> ledger = paged_jax.ledger.init(paged_jax.CacheConfig(num_rows=2))
  >>> log = paged_jax.Log(operands=((jnp.array([[5, 0], [1, 3]]),),), verbs=("extend",))
  >>> replay(ledger, log).tables.lengths.tolist()
  [6, 3]

  Raises:
    ValueError: The log names a verb that a ledger does not have, or lacks operands.
  """
  check(log)

  def step(ledger, operands):
    for verb, arrays in zip(log.verbs, operands):
      ledger = VERBS[verb](ledger, *arrays)[0]
    return ledger, None

  return jax.lax.scan(step, ledger, log.operands)[0]
