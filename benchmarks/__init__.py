"""Measurements whose results are committed under docs/."""
