"""Benchmarks: what they ask, how they score, and the reports they leave in a run."""
