"""Compiles a configuration for hardware that is not here: `python -m storm_jax.preflight --help`."""
