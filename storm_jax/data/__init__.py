"""Data sources to batches of packed rows. Everything here is NumPy: no module imports a model."""
