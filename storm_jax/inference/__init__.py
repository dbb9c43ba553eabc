"""Answers from a trained run: generation with a key-value cache, batched over samples."""
