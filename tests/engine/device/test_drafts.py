"""What drafters guess."""

import jax.numpy as jnp
import pytest

from paged_jax.engine import PromptLookup


@pytest.mark.parametrize(
  "text, longest, drafts",
  [
    ([5, 6, 7, 8, 5, 6], 3, [7, 8, 5]),
    ([5, 6, 1, 5, 6, 2, 9, 5, 6], 3, [2, 9, 5]),  # the latest of two
    ([1, 5, 6, 3, 2, 5, 6, 4, 1, 5, 6], 3, [3, 2, 5]),  # the longest ending
    ([1, 5, 6, 3, 2, 5, 6, 4, 1, 5, 6], 2, [4, 1, 5]),
    ([1, 2, 3], 3, [3, 3, 3]),  # nothing like it before
    ([7, 7], 3, [7, 7, 7]),  # past the end: the last token
    ([4], 3, [4, 4, 4]),
  ],
)
def test_prompt_lookup_repeats_what_followed(text, longest, drafts):
  texts = jnp.array([text + [9] * (12 - len(text))] * 2, jnp.int32)
  got = PromptLookup(3, longest)(texts, jnp.array([len(text)] * 2, jnp.int32))
  assert got.tolist() == [drafts] * 2


@pytest.mark.parametrize("field", ["num_drafts", "longest"])
def test_a_drafter_that_drafts_nothing_is_refused(field):
  with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
    PromptLookup(**{field: 0})
