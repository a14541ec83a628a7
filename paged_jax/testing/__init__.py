"""What this library tests itself with, for testing yours: laws, a plain-Python model, histories.

`strategies` and `replay` need hypothesis; the rest needs nothing beyond the library.
"""

from paged_jax.testing import invariants as invariants
from paged_jax.testing.in_place import assert_in_place as assert_in_place
from paged_jax.testing.model import Model as Model
