"""Drafters: which tokens probably come next, so that one pass of the model can verify several.

Speculative decoding (Leviathan et al. 2023): what the model itself would have drawn is kept, the
rest is trimmed, so the text is that of plain decoding. Axis letters: S rows, X longest text, D
drafted tokens.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Drafter(Protocol):
  """Guesses the next tokens of every row, inside the program. Hashable: it is compiled in."""

  num_drafts: int  # D, static

  def __call__(self, texts: jax.Array, lengths: jax.Array) -> jax.Array:
    """i32[S,D] for rows whose texts are the first `lengths` i32[S] tokens of `texts` i32[S,X]."""
    ...


@dataclasses.dataclass(frozen=True)
class PromptLookup:
  """Repeats what followed when the text last read as it ends now (Saxena 2023, prompt lookup).

  The longest ending of up to `longest` tokens counts, the latest one of several; without any the
  last token is repeated.

  >>> import jax.numpy as jnp
  >>> from paged_jax.engine import PromptLookup
  >>> text = jnp.array([[5, 6, 7, 8, 5, 6, 0, 0]])
  >>> PromptLookup(num_drafts=2)(text, jnp.array([6])).tolist()
  [[7, 8]]
  """

  num_drafts: int = 4
  longest: int = 3

  def __post_init__(self):
    for name in ("num_drafts", "longest"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

  def __call__(self, texts: jax.Array, lengths: jax.Array) -> jax.Array:
    """i32[S,D] for rows whose texts are the first `lengths` i32[S] tokens of `texts` i32[S,X]."""
    s, x = texts.shape
    ends = jnp.arange(x, dtype=jnp.int32)[None]
    rows = jnp.arange(s, dtype=jnp.int32)[:, None]
    last = lengths[:, None] - 1
    alike = jnp.ones((s, x), bool)
    common = jnp.zeros((s, x), jnp.int32)  # tokens up to here that read like the text's end
    for back in range(self.longest):
      token = texts.at[rows, jnp.maximum(last - back, 0)].get(mode="clip")
      alike &= (jnp.roll(texts, back, axis=1) == token) & (ends >= back) & (back <= last)
      common += alike.astype(jnp.int32)
    best = jnp.argmax(jnp.where(ends < last, common * x + ends, -1), axis=1)[:, None]
    best = jnp.where(jnp.max(jnp.where(ends < last, common, 0), axis=1)[:, None] > 0, best, last)
    nth = jnp.arange(self.num_drafts, dtype=jnp.int32)[None]
    return texts.at[rows, jnp.minimum(best + 1 + nth, jnp.maximum(last, 0))].get(mode="clip")
