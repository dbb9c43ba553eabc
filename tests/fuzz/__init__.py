"""Damages what people bring and what a run stores, and counts how it ends."""
