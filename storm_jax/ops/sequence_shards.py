"""Scans and convolutions of a sequence that is sharded over the mesh axis "context".

Inside a `shard_map`, each device has consecutive steps. A convolution needs the last few steps of the
previous shard (`halo`). A scan (`scan_shard`) first runs from a zero state; then its shards exchange how much each
decays a state and its own final state, and every shard adds what the state it starts from contributes to its
outputs. What is exchanged does not grow with the length.

The previous shard is that which is scanned before: the one on the right with `reverse`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from storm_jax.ops.chunks import from_chunks, to_chunks
from storm_jax.ops.spans import segment_starts
from storm_jax.sharding import num_shards, spec_in_context

AXIS = "context"
CHUNK = 256  # steps whose contribution of the incoming state is computed at a time


def local_length(length: int) -> int:
    """Steps on each device, of a sequence of this length under the context mesh."""
    return length // num_shards((length,), "sequence")[0]


def is_sharded(length: int) -> bool:
    """Whether sequences of this length are sharded under the context mesh."""
    return local_length(length) < length


def steps_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array [B, L, ...] whose other axes have these logical names."""
    return spec_in_context(shape, "batch", "sequence", *axes)


def halo(x: jax.Array, steps: int, reverse: bool) -> jax.Array:
    """The `steps` steps before this shard [B, L, ...], zeros for the first one; L >= `steps`."""
    shards, length = jax.lax.axis_size(AXIS), x.shape[1]
    last = x[:, :steps] if reverse else x[:, length - steps :]
    pairs = [(i, i + 1) for i in range(shards - 1)]
    return jax.lax.ppermute(last, AXIS, [pair[::-1] for pair in pairs] if reverse else pairs)


def gather(x: jax.Array) -> jax.Array:
    """All shards [B, L, ...] of a sequence."""
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def is_first(reverse: bool) -> jax.Array:
    """Whether this shard is scanned first."""
    return jax.lax.axis_index(AXIS) == (jax.lax.axis_size(AXIS) - 1 if reverse else 0)


def shard_starts(segment_ids: jax.Array, reverse: bool) -> jax.Array:
    """`segment_starts` of a shard [B, L], whose first step may continue the previous shard's segment."""
    starts = segment_starts(segment_ids, reverse)
    first = -1 if reverse else 0
    changed = halo(segment_ids, 1, reverse)[:, 0] != segment_ids[:, first]
    return starts.at[:, first].set(changed & ~is_first(reverse))


def incoming_state(decay: jax.Array, h: jax.Array, reverse: bool) -> jax.Array:
    """The state at the start of this shard, from one all-gather.

    Args:
      decay: [B, ...], of a state over this shard; its axes are leading axes of `h`, or 1.
      h: [B, ...], the final state of this shard if it starts from zero, or from `h0` in the first one.

    Returns:
      [B, ...]; zero for the first shard.
    """
    batch = h.shape[0]
    local = jnp.concatenate([decay.reshape(batch, -1), h.reshape(batch, -1)], axis=1)
    gathered = jax.lax.all_gather(local, AXIS)  # [P, B, ...]
    decays, states = jnp.split(gathered, [math.prod(decay.shape[1:])], axis=2)
    here, shards = jax.lax.axis_index(AXIS), gathered.shape[0]
    state = jnp.zeros_like(h)
    for i in reversed(range(shards)) if reverse else range(shards):
        after = decays[i].reshape(decay.shape) * state + states[i].reshape(h.shape)
        state = jnp.where(i > here if reverse else i < here, after, state)
    return state


def scan_shard(
    scan: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    steps: Any,
    segment_ids: jax.Array,
    h0: jax.Array,
    *,
    step_size: Callable[[Any], jax.Array],
    decay: Callable[[jax.Array], jax.Array],
    read: Callable[[Any, jax.Array, jax.Array], jax.Array],
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """Scans a shard of a sequence, from the state that the shards before it leave.

    Args:
      scan: maps segment starts, bool [B, L], and an initial state to y [B, L, ...] and the final state.
      steps: a tree of arrays [B, L, ...], which the next two functions receive in chunks of Q steps.
      segment_ids: int [B, L].
      h0: [B, ...], the state before the whole sequence.
      step_size: maps steps to their sizes [B, Q, ...] in fp32.
      decay: maps a sum of step sizes to the decay of a state over them, in axes that broadcast with the state's.
      read: maps steps, decays [B, Q, ...] and a state to what the decayed state adds to y [B, Q, ...].
      reverse: scan from the last step to the first.

    Returns:
      y [B, L, ...], and the state after the whole sequence.
    """
    starts = shard_starts(segment_ids, reverse)
    is_reached = jax.lax.cumsum(starts.astype(jnp.int32), 1, reverse) == 0  # by the incoming state
    y, h = scan(starts, jnp.where(is_first(reverse), h0, 0))
    is_passed = is_reached.all(axis=1).reshape(-1, *(1,) * (h.ndim - 1))
    over_shard = jnp.where(is_passed, decay(step_size(steps).sum(axis=1)), 0)
    incoming = incoming_state(over_shard, h, reverse)
    y = _add_incoming(
        y,
        steps,
        is_reached,
        step_size,
        lambda steps, decays: read(steps, decays, incoming),
        decay,
        reverse,
    )
    is_last = is_first(not reverse)
    after = jnp.where(is_last, over_shard * incoming + h, 0)
    return y, jax.lax.psum(after, AXIS)


def _add_incoming(
    y: jax.Array,
    steps: Any,
    is_reached: jax.Array,
    step_size: Callable[[Any], jax.Array],
    read: Callable[[Any, jax.Array], jax.Array],
    decay: Callable[[jax.Array], jax.Array],
    reverse: bool,
) -> jax.Array:
    """Adds what the incoming state contributes to the steps that it reaches, chunk by chunk."""
    length = y.shape[1]

    @jax.checkpoint
    def body(total: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
        y, steps, is_reached = chunk
        sizes = step_size(steps)
        sizes = jnp.where(_like(is_reached, sizes), sizes, 0)
        added = read(steps, decay(total[:, None] + jax.lax.cumsum(sizes, 1, reverse)))
        y = (y + jnp.where(_like(is_reached, added), added, 0)).astype(y.dtype)
        return total + sizes.sum(axis=1), y

    size = min(CHUNK, length)
    chunks = jax.tree.map(lambda v: to_chunks(v, size), (y, steps, is_reached))
    first = jax.tree.map(lambda v: v[0], chunks[1])
    total = jnp.zeros_like(step_size(first)[:, 0])
    _, y = jax.lax.scan(body, total, chunks, reverse=reverse)
    return from_chunks(y, length)


def _like(mask: jax.Array, v: jax.Array) -> jax.Array:
    """[B, Q] -> [B, Q, 1, ...] with as many axes as `v`."""
    return mask.reshape(mask.shape + (1,) * (v.ndim - 2))
