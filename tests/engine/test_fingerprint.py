"""The fingerprint of a model changes with every bit of it, and with no process."""

import os

import numpy as np
import tiny

from paged_jax.engine.fingerprint import fingerprint


def test_the_fingerprint_is_that_of_the_arrays_and_the_structure():
  model = tiny.model(0)
  assert fingerprint(model) == fingerprint(tiny.model(0))
  one_bit = np.array(model.q)
  one_bit.view(np.uint32)[0, 0, 0] ^= 1
  others = [
    tiny.model(1), [model], (model.q,), (np.asarray(model.q),), (one_bit,), (model.q.T,),
    (model.q, 1), (model.q, 2), {"a": model.q}, (np.asarray(model.q).view(np.int32),),
  ]  # fmt: skip
  prints = [fingerprint(each) for each in others]
  assert prints[2] == prints[3]
  assert len({*prints, fingerprint(model)}) == len(others)
  assert fingerprint((model.q, os.getcwd)) == fingerprint((model.q, os.getcwd))
