"""`python -m paged_jax` is `paged-jax`."""

from paged_jax.cli.main import main

main()
