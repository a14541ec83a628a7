"""The tools that test this library, for your tests too: laws, a plain-Python model, histories.

`strategies` and `replay` need hypothesis; the rest needs only the library.
"""

from paged_jax.testing import invariants as invariants
from paged_jax.testing.in_place import assert_in_place as assert_in_place
from paged_jax.testing.model import Model as Model

__all__ = ["Model", "assert_in_place", "invariants"]
