"""Answers from a trained run: generation with a key-value cache, and batching over samples."""
