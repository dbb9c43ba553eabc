"""Position embeddings for another image size, as torch resamples them."""

from __future__ import annotations

import numpy as np

_A = -0.75  # of torch's bicubic kernel; jax.image.resize has -0.5 and is far off


def resample(embeddings: np.ndarray, side: int) -> np.ndarray:
    """Bicubic with half-pixel centres and without antialiasing, edges repeated: what
    `interpolate_pos_encoding` of transformers' SigLIP does (torch's `interpolate`).

    Args:
      embeddings: [P, D] of a square grid in raster order.
      side: patches along an edge of the new grid.

    Returns:
      [side * side, D] in the dtype of `embeddings`; computed in fp64.
    """
    old = round(len(embeddings) ** 0.5)
    if old * old != len(embeddings):
        raise ValueError(f"{len(embeddings)} position embeddings are no square grid")
    weights = _matrix(old, side)
    grid = embeddings.reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("ip,jq,pqd->ijd", weights, weights, grid, optimize=True)
    return grid.reshape(side * side, -1).astype(embeddings.dtype)


def _matrix(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of one axis (Keys, 1981, equation 15)."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        distance = np.abs(centres - (first + tap))
        near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
        far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
        value = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), value)
    return weights
