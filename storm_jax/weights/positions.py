"""Resamples position embeddings to another image size, as torch does."""

from __future__ import annotations

import numpy as np

_A = -0.75  # torch's bicubic coefficient; jax.image.resize uses -0.5 and differs visibly


def resample(embeddings: np.ndarray, side: int) -> np.ndarray:
    """Bicubic with half-pixel centres, no antialiasing, edges repeated.

    Same as `interpolate_pos_encoding` of transformers' SigLIP (torch's `interpolate`).

    Args:
      embeddings: [P, D], a square grid in raster order.
      side: patches along one edge of the new grid.

    Returns:
      [side * side, D] in the dtype of `embeddings`; computed in float64.

    Raises:
      ValueError: if the grid is not square.
    """
    old = round(len(embeddings) ** 0.5)
    if old * old != len(embeddings):
        raise ValueError(f"{len(embeddings)} position embeddings are not a square grid")
    weights = _interpolation_matrix(old, side)
    grid = embeddings.reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("ip,jq,pqd->ijd", weights, weights, grid, optimize=True)
    return grid.reshape(side * side, -1).astype(embeddings.dtype)


def _interpolation_matrix(old: int, new: int) -> np.ndarray:
    """Weights [new, old] along one axis (Keys, 1981, equation 15)."""
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
