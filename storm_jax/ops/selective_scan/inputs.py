"""The inputs shared by all implementations of the selective scan."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """The scan's inputs in the layout of the implementations; also used for their gradients."""

    x: jax.Array  # [B, L, E]
    dt: jax.Array  # [B, L, E], before the softplus if there is a bias
    A: jax.Array  # [N, E] fp32
    B: jax.Array  # [B, L, N]
    C: jax.Array  # [B, L, N]
    D: jax.Array  # [E] fp32
    dt_bias: jax.Array | None  # [E] fp32


def step_size(dt: jax.Array, dt_bias: jax.Array | None) -> jax.Array:
    """Returns the step size in fp32: `dt`, or softplus(dt + dt_bias) with a bias [E]."""
    dt = dt.astype(jnp.float32)
    if dt_bias is None:
        return dt
    return jax.nn.softplus(dt + dt_bias.reshape((1,) * (dt.ndim - 1) + dt_bias.shape))


def step_size_derivative(step: jax.Array, dt_bias: jax.Array | None) -> jax.Array:
    """Returns the derivative of a step size with respect to `dt`.

    The derivative of softplus is 1 - exp(-softplus).
    """
    return jnp.ones_like(step) if dt_bias is None else -jnp.expm1(-step)
