"""STORM in JAX: token-efficient long video understanding."""
