"""Samples to packed rows. Numpy only: nothing here imports JAX or a model."""
