"""Helpers of the parity tests of both mixers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from storm_jax.models.mamba import MambaMixer


def gradient_of(mixer: MambaMixer, u: np.ndarray, weights: np.ndarray) -> tuple:
    """Returns the mixer's output and the gradient of its weighted sum with respect to `u`."""
    graphdef, state = nnx.split(mixer)
    segment_ids = jnp.ones(u.shape[:2], jnp.int32)

    def weighted(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, _ = nnx.merge(graphdef, state)(u, segment_ids)
        return jnp.sum(y * weights), y

    (_, y), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(u)
    return y, gradient


def max_error(found: jax.Array, expected: torch.Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(np.asarray(found) - expected.detach().numpy()).max())
