"""The depthwise causal convolution in front of a selective scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
) -> jax.Array:
    """y[t] = bias + sum_j kernel[K-1-j] * x[t-j], where x before the start of a segment is zero.

    Args:
      x: [B, L, E].
      kernel: [K, E]; the last tap is the current step, as in torch's padded Conv1d.
      bias: [E].
      segment_ids: int [B, L]; taps never reach another segment.
      reverse: run from the end: x[t+j] in place of x[t-j].

    Returns:
      [B, L, E] in the dtype of `x`.
    """
    length, taps = x.shape[1], kernel.shape[0]
    y = bias[None, None] + kernel[-1][None, None] * x
    for j in range(1, min(taps, length)):
        past = _shift(x, j, reverse)
        if segment_ids is not None:
            same = _shift(segment_ids, j, reverse) == segment_ids  # padding only meets zeros
            past = jnp.where(same[..., None], past, 0)
        y += kernel[-1 - j][None, None] * past
    return y.astype(x.dtype)


def _shift(x: jax.Array, steps: int, reverse: bool) -> jax.Array:
    pad = [(0, 0), (0, steps) if reverse else (steps, 0)] + [(0, 0)] * (x.ndim - 2)
    start = steps if reverse else 0
    return jax.lax.slice_in_dim(jnp.pad(x, pad), start, start + x.shape[1], axis=1)
