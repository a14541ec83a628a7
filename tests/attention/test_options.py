import jax.numpy as jnp
import pytest

from paged_jax.attention import options

Q = jnp.zeros((3, 4, 16))


def test_nothing_asked_for_is_the_usual_scale_and_no_window():
  made = options.make(Q)
  assert float(made.scale) == 0.25 and int(made.window) == 2**31 - 1
  assert made.softcap is None and made.sinks is None


def test_what_is_asked_for_becomes_arrays():
  made = options.make(Q, scale=2, window=7, softcap=3, sinks=jnp.ones(4, jnp.bfloat16))
  assert [x.dtype for x in (made.scale, made.window, made.softcap, made.sinks)] == [
    jnp.float32, jnp.int32, jnp.float32, jnp.float32,
  ]  # fmt: skip


@pytest.mark.parametrize(
  "name, value", [("window", 2.5), ("window", 2**31), ("sinks", jnp.ones(3))]
)
def test_misuse_names_the_argument(name, value):
  with pytest.raises(ValueError, match=f"^{name} "):
    options.make(Q, **{name: value})
