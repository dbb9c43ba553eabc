"""The depthwise causal convolution that precedes a selective scan."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from storm_jax.ops import sequence_shards


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
    if reverse:
        next_cache = jnp.concatenate([x[:, :context], cache], axis=1)[:, :context]
    else:
        ends = jnp.concatenate([cache, x[:, max(0, length - context) :]], axis=1)
        next_cache = ends[:, ends.shape[1] - context :]
    if not sequence_shards.is_sharded(length) or sequence_shards.local_length(length) < context:
        return _conv(x, kernel, bias, segment_ids, cache, reverse), next_cache
    if segment_ids is None:
        segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
    steps = sequence_shards.steps_spec(x.shape, "inner")
    channels = P(None, steps[2])
    conv = jax.shard_map(
        functools.partial(_conv_shard, reverse=reverse),
        in_specs=(steps, channels, P(steps[2]), P(*steps[:2]), P(steps[0], None, steps[2])),
        out_specs=steps,
    )
    return conv(x, kernel, bias, segment_ids, cache), next_cache


def _conv_shard(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    segment_ids: jax.Array,
    cache: jax.Array,
    *,
    reverse: bool,
) -> jax.Array:
    """The convolution of a shard; `cache` precedes the whole sequence."""
    context = kernel.shape[0] - 1
    before = sequence_shards.halo(x, context, reverse)
    ids_before = sequence_shards.halo(segment_ids, context, reverse)
    first_id = segment_ids[:, -1:] if reverse else segment_ids[:, :1]
    before = jnp.where((ids_before == first_id)[..., None], before, 0)
    cache = jnp.where(sequence_shards.is_first(reverse), cache, before)
    return _conv(x, kernel, bias, segment_ids, cache, reverse)


def _conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    segment_ids: jax.Array | None,
    cache: jax.Array,
    reverse: bool,
) -> jax.Array:
    length, context = x.shape[1], kernel.shape[0] - 1
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
    return y.astype(x.dtype)
