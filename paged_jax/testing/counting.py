"""A model for examples and tests of engines: it counts."""

import dataclasses

import jax

from paged_jax.types import Cache, Plan


@dataclasses.dataclass(frozen=True)
class Counting:
  """After token t comes token t + 1. It computes nothing else, and writes nothing.

  >>> from paged_jax.testing.counting import Counting
  >>> Counting(vocab_size=5).logits(jax.numpy.array([2])).tolist()
  [[0.0, 0.0, 0.0, 9.0, 0.0]]
  """

  vocab_size: int = 64

  def __call__(self, tokens: jax.Array, cache: Cache, plan: Plan) -> tuple[jax.Array, Cache]:
    """The tokens i32[B] are the hidden states."""
    del plan
    return tokens, cache

  def logits(self, hidden: jax.Array) -> jax.Array:
    """f32[B,V]"""
    return 9.0 * jax.nn.one_hot((hidden + 1) % self.vocab_size, self.vocab_size)
