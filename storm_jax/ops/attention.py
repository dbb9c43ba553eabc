"""Softmax attention, computed one chunk of queries at a time."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from storm_jax.ops import sequence_shards
from storm_jax.ops.chunks import from_chunks, to_chunks

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

    If the sequence is sharded over the mesh, each device computes its queries and gathers all keys and values of
    its rows and heads. A ring would move as many bytes, in more steps: every device needs every key. With few
    key-value heads, they are small compared to the activations.

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

    queries, keys = (q, q_positions, q_segments), (k, v, kv_positions, kv_segments)
    if q_positions is None or not sequence_shards.is_sharded(q.shape[1]):
        return _attention(queries, keys)
    query_specs, key_specs = jax.tree.map(_spec, (queries, keys))

    gathers = sequence_shards.is_sharded(k.shape[1])

    def attend_shard(queries: tuple, keys: tuple) -> jax.Array:
        return _attention(queries, jax.tree.map(sequence_shards.gather, keys) if gathers else keys)

    attend = jax.shard_map(
        attend_shard, in_specs=(query_specs, key_specs), out_specs=query_specs[0]
    )
    return attend(queries, keys)


def _attention(queries: tuple, keys: tuple) -> jax.Array:
    k, v, kv_positions, kv_segments = keys

    def attend(q: jax.Array, positions: jax.Array | None, segments: jax.Array | None) -> jax.Array:
        mask = None
        if positions is not None and kv_positions is not None:
            mask = kv_positions[:, None, :] <= positions[:, :, None]  # [B, C, T]
            if segments is not None and kv_segments is not None:
                mask &= kv_segments[:, None, :] == segments[:, :, None]
            mask = mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    length = queries[0].shape[1]
    if length <= QUERY_CHUNK:
        return attend(*queries)
    chunks = jax.tree.map(lambda x: to_chunks(x, QUERY_CHUNK), queries)
    out = jax.lax.map(jax.checkpoint(lambda args: attend(*args)), chunks)
    return from_chunks(out, length)


def _spec(x: jax.Array) -> PartitionSpec:
    return sequence_shards.steps_spec(x.shape, *("kv_heads", None)[: x.ndim - 2])
