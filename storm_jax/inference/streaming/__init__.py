"""Videos that are asked about while they arrive."""
