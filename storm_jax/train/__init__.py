"""Training: the loop, its state and steps, checkpoints, validation and metrics."""
