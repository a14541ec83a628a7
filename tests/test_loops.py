"""Things of rows, numbered through all rows."""

import jax.numpy as jnp
import pytest

from paged_jax import loops

COUNTS = [2, 0, 3, 0, 1]


@pytest.mark.parametrize("compared", [0, loops.COMPARED], ids=["bisection", "comparison"])
def test_each_thing_finds_its_row_and_its_number_there(compared, monkeypatch):
  monkeypatch.setattr(loops, "COMPARED", compared)
  rows, nth = loops.locate(jnp.array(COUNTS), jnp.arange(8, dtype=jnp.int32))
  assert rows.tolist() == [0, 0, 2, 2, 2, 4, 5, 5]  # 5 is no row
  assert nth[:6].tolist() == [0, 1, 0, 1, 2, 0]
