"""Which keys a query attends to."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from storm_jax.ops.spans import segment_starts


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("first", "last"),
    meta_fields=("is_causal",),
)
@dataclasses.dataclass(frozen=True)
class KeyRange:
    """Each query attends to the keys from `first` to `last` inclusive, int [B, S]; at least one.

    Attributes:
      is_causal: whether `last` is the query's own slot, and all queries of a segment have the same `first`.
    """

    first: jax.Array
    last: jax.Array
    is_causal: bool = False


def causal_keys(segment_ids: jax.Array) -> KeyRange:
    """Every token of packed samples, int [B, S], attends to its own sample up to itself; padding (0) to itself."""
    slots = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    is_first = segment_starts(segment_ids, reverse=False) | (segment_ids == 0)
    first = jax.lax.cummax(jnp.where(is_first, slots, 0), axis=1)
    return KeyRange(first, slots, is_causal=True)
