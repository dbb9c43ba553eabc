"""Softmax attention, computed one chunk of queries at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

QUERY_CHUNK = 256


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention, bidirectional or causal within segments.

    Without positions, every query attends to every key. With positions, a query attends to the keys
    of its own segment whose positions are at most its own.

    Logits and softmax are fp32. The logits take [B, H, QUERY_CHUNK, T] memory; the backward pass
    recomputes them chunk by chunk.

    Args:
      q: [B, S, H, K].
      k, v: [B, T, H_kv, K]; H must be a multiple of H_kv.
      q_positions, q_segments: int [B, S].
      kv_positions, kv_segments: int [B, T].

    Returns:
      [B, S, H, K] in the dtype of `q`.
    """

    def attend(q: jax.Array, positions: jax.Array | None, segments: jax.Array | None) -> jax.Array:
        mask = None
        if positions is not None and kv_positions is not None:
            mask = kv_positions[:, None, :] <= positions[:, :, None]  # [B, C, T]
            if segments is not None and kv_segments is not None:
                mask &= kv_segments[:, None, :] == segments[:, :, None]
            mask = mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    length = q.shape[1]
    if length <= QUERY_CHUNK:
        return attend(q, q_positions, q_segments)

    def chunks(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        pad = [(0, 0), (0, -length % QUERY_CHUNK)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, mode="edge")
        return x.reshape(x.shape[0], -1, QUERY_CHUNK, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(
        jax.checkpoint(lambda args: attend(*args)),
        (chunks(q), chunks(q_positions), chunks(q_segments)),
    )  # [S / C, B, C, H, K]
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]
