"""Chunks of a sequence, to be processed one at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_chunks(x: jax.Array, size: int) -> jax.Array:
    """Cuts [B, L, ...] into chunks [K, B, size, ...]; the last one is zero-padded."""
    batch, length, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * len(rest))
    return x.reshape(batch, -1, size, *rest).swapaxes(0, 1)


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `to_chunks`: [K, B, size, ...] -> [B, L, ...]."""
    _, batch, _, *rest = x.shape
    return x.swapaxes(0, 1).reshape(batch, -1, *rest)[:, :length]
