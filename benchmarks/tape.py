"""Everything that an engine dispatches, to be dispatched again back to back, without the engine."""

import functools
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

from paged_jax.engine import Engine, calls


class Tape:
  """What was dispatched, each call with what it took besides the device's own state."""

  def __init__(self, engine: Engine):
    self.played = []
    self._engine, self._state = engine, engine.manager._state
    self.run, self.verbs = calls._run, self._state.verbs

  def verb(self, name, cache, *operands):
    self.played.append((name, operands, {}))
    return getattr(self.verbs, name)(cache, *operands)

  def program(self, cache, model, rows, past, *operands, **statics):
    self.played.append((None, (model, *operands), statics))
    return self.run(cache, model, rows, past, *operands, **statics)

  def seconds(self) -> float:
    """How long the device takes for all of it; the engine's own state stays as it is."""
    kept = (self._state.cache, self._engine._calls._rows, self._engine._calls._past)
    cache, rows, past = jax.block_until_ready(jax.tree.map(jnp.copy, kept))
    began = time.perf_counter()
    for name, operands, statics in self.played:
      if name is None:
        model, *rest = operands
        cache, _, (rows, past, _) = self.run(cache, model, rows, past, *rest, **statics)
      else:
        cache = getattr(self.verbs, name)(cache, *operands)[0]
    jax.block_until_ready(cache)
    return time.perf_counter() - began


def record(engine: Engine, work: Callable[[], object]) -> Tape:
  """What `work` makes the engine dispatch."""
  tape = Tape(engine)
  names = [name for name in vars(tape.verbs) if callable(getattr(tape.verbs, name))]
  verbs = {name: functools.partial(tape.verb, name) for name in names}
  calls._run, engine.manager._state.verbs = tape.program, types.SimpleNamespace(**verbs)
  try:
    work()
  finally:
    calls._run, engine.manager._state.verbs = tape.run, tape.verbs
  return tape
