"""The `paged-jax` command."""
