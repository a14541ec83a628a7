"""One step of beam search by hand."""

import jax.numpy as jnp
import numpy as np

from paged_jax.engine.device import beams


def test_one_step_by_hand():
  choice = beams.choose(
    jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]])),
    groups=jnp.array([0, 0, 4, 0], jnp.int32),  # row 2 is alone
    scores=jnp.log(jnp.array([0.4, 0.3, 0.0, 0.25])),
    ended=jnp.array([False, False, False, True]),
    num_beams=3,
  )
  # 0.27 = row 1 with token 0, 0.25 = row 3 as it is, 0.2 = row 0 with token 0
  assert choice.sources.tolist() == [1, 3, 2, 0]
  assert choice.grows.tolist() == [True, False, False, True]
  assert [choice.tokens[0], choice.tokens[3]] == [0, 0]
  np.testing.assert_allclose(jnp.exp(choice.scores), [0.27, 0.25, 0.0, 0.2], rtol=1e-5)


def test_what_is_not_a_number_is_never_chosen():
  choice = beams.choose(
    jnp.array([[jnp.nan, jnp.nan], [0.0, jnp.nan]]), groups=jnp.zeros(2, jnp.int32),
    scores=jnp.zeros(2), ended=jnp.zeros(2, bool), num_beams=2,
  )  # fmt: skip
  assert choice.sources.tolist() == [1, 1]
  assert choice.grows.tolist() == [True, False]
