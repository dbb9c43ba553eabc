"""What every implementation of the selective scan reads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """The arrays of a scan as its implementations and its backward pass keep them; also their
    gradients."""

    x: jax.Array  # [B, L, E]
    dt: jax.Array  # [B, L, E], before the softplus when there is a bias
    A: jax.Array  # [N, E] fp32
    B: jax.Array  # [B, L, N]
    C: jax.Array  # [B, L, N]
    D: jax.Array  # [E] fp32
    dt_bias: jax.Array | None  # [E] fp32


def step_size(dt: jax.Array, dt_bias: jax.Array | None) -> jax.Array:
    """The step size in fp32; the bias is over the last axis."""
    dt = dt.astype(jnp.float32)
    if dt_bias is None:
        return dt
    return jax.nn.softplus(dt + dt_bias.reshape((1,) * (dt.ndim - 1) + dt_bias.shape))


def step_size_slope(step: jax.Array, dt_bias: jax.Array | None) -> jax.Array:
    """Derivative of a step size with respect to `dt`: that of softplus is 1 - exp(-softplus)."""
    return jnp.ones_like(step) if dt_bias is None else -jnp.expm1(-step)
