"""Parameter-free array functions."""
