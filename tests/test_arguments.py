import jax.numpy as jnp
import pytest

from paged_jax import arguments


@pytest.mark.parametrize(
  ("check", "value", "message"),
  [
    (arguments.integers, jnp.zeros(2), "rows must have an integer dtype, got float32"),
    (arguments.booleans, jnp.zeros(2), "rows must have a bool dtype, got float32"),
    (arguments.floats, jnp.zeros(2, int), "rows must have a floating-point dtype, got int32"),
  ],
)
def test_a_wrong_dtype_is_named_with_the_right_one(check, value, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    check("rows", value, (2,))
