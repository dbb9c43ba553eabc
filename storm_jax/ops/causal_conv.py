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
    before: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y[t] = bias + sum_j kernel[K-1-j] * x[t-j], where x before the start of a segment is zero.

    Args:
      x: [B, L, E].
      kernel: [K, E]; the last tap is the current step, as in torch's padded Conv1d.
      bias: [E].
      segment_ids: int [B, L]; taps never reach another segment.
      reverse: run from the end: x[t+j] in place of x[t-j].
      before: [B, K-1, E], the steps that `x` continues, in its first segment; zero when None.

    Returns:
      y [B, L, E] in the dtype of `x`; the last K-1 steps, for the convolution that goes on.
    """
    length, reach = x.shape[1], kernel.shape[0] - 1
    if before is None:
        before = jnp.zeros_like(x, shape=(x.shape[0], reach, x.shape[2]))
    joined = jnp.concatenate([x, before] if reverse else [before, x], axis=1)
    if segment_ids is not None:
        edge = ((0, 0), (0, reach) if reverse else (reach, 0))
        segment_ids = jnp.pad(segment_ids, edge, mode="edge")

    def shifted(v: jax.Array, steps: int) -> jax.Array:  # [B, K-1 + L, ...] -> [B, L, ...]
        start = steps if reverse else reach - steps
        return jax.lax.slice_in_dim(v, start, start + length, axis=1)

    y = bias[None, None] + kernel[-1][None, None] * x
    for j in range(1, reach + 1):
        past = shifted(joined, j)
        if segment_ids is not None:
            same = shifted(segment_ids, j) == shifted(segment_ids, 0)
            past = jnp.where(same[..., None], past, 0)
        y += kernel[-1 - j][None, None] * past
    last = joined[:, :reach] if reverse else joined[:, length:]
    return y.astype(x.dtype), last
