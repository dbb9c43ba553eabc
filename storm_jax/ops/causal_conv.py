"""The depthwise causal convolution that precedes a selective scan."""

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
    cache: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes y[t] = bias + sum_j kernel[K-1-j] * x[t-j] with zero padding before each segment.

    Args:
      x: [B, L, E].
      kernel: [K, E]; the last tap multiplies the current step, as in a left-padded torch Conv1d.
      bias: [E].
      segment_ids: int [B, L]; taps do not cross segment boundaries.
      reverse: run from the end, with x[t+j] in place of x[t-j].
      cache: [B, K-1, E], the steps before `x`, which belong to its first segment; None means zeros.

    Returns:
      y [B, L, E] in the dtype of `x`, and the last K-1 steps [B, K-1, E]: the `cache` of the next
      call.
    """
    length, context = x.shape[1], kernel.shape[0] - 1
    if cache is None:
        cache = jnp.zeros_like(x, shape=(x.shape[0], context, x.shape[2]))
    padded = jnp.concatenate([x, cache] if reverse else [cache, x], axis=1)
    if segment_ids is not None:
        padding = ((0, 0), (0, context) if reverse else (context, 0))
        segment_ids = jnp.pad(segment_ids, padding, mode="edge")

    def shift(v: jax.Array, steps: int) -> jax.Array:  # [B, K-1 + L, ...] -> [B, L, ...]
        start = steps if reverse else context - steps
        return jax.lax.slice_in_dim(v, start, start + length, axis=1)

    y = bias[None, None] + kernel[-1][None, None] * x
    for j in range(1, context + 1):
        previous = shift(padded, j)
        if segment_ids is not None:
            same_segment = shift(segment_ids, j) == shift(segment_ids, 0)
            previous = jnp.where(same_segment[..., None], previous, 0)
        y += kernel[-1 - j][None, None] * previous
    next_cache = padded[:, :context] if reverse else padded[:, length:]
    return y.astype(x.dtype), next_cache
