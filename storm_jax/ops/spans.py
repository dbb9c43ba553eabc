"""A scan's loop over parts of the length, which are read where they lie and written where they belong:
no array is padded, transposed or cast as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Span(NamedTuple):
    """Steps [start, start + size) of the length: part `number`."""

    number: jax.Array | int
    start: jax.Array | int
    size: int

    def read(self, arrays: Any) -> Any:
        """These steps of arrays [B, L, ...]."""
        return jax.tree.map(
            lambda v: jax.lax.dynamic_slice_in_dim(v, self.start, self.size, axis=1), arrays
        )

    def write(self, arrays: Any, here: Any) -> Any:
        """Arrays [B, L, ...] with these steps of them replaced, in their dtypes. A single row may
        come without its axis."""

        def put(v: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(v.shape[0], self.size, *v.shape[2:]).astype(v.dtype)
            return jax.lax.dynamic_update_slice_in_dim(v, new, self.start, axis=1)

        return jax.tree.map(put, arrays, here)


def over_spans(
    body: Callable[[Any, Span], Any], carry: Any, length: int, size: int, reverse: bool
) -> Any:
    """`carry = body(carry, span)` for every `size` steps of the length in turn, from its end with
    `reverse`; the last span may be shorter."""
    whole, rest = divmod(length, size)
    tail = Span(whole, whole * size, rest)

    def step(i: jax.Array, carry: Any) -> Any:
        number = whole - 1 - i if reverse else i
        return body(carry, Span(number, number * size, size))

    if rest and reverse:
        carry = body(carry, tail)
    carry = jax.lax.fori_loop(0, whole, step, carry)
    if rest and not reverse:
        carry = body(carry, tail)
    return carry


def varying_alike(arrays: Any) -> Any:
    """Inside a `shard_map`, marks every array as varying over each mesh axis that any of them varies
    over: loops carry them together, and the gradient of one that came whole is then summed."""
    axes = {axis for v in jax.tree.leaves(arrays) for axis in jax.typeof(v).mat.varying}

    def cast(v: jax.Array) -> jax.Array:
        return jax.lax.pcast(v, tuple(sorted(axes - jax.typeof(v).mat.varying)), to="varying")

    return jax.tree.map(cast, arrays)


def segment_starts(segment_ids: jax.Array, reverse: bool) -> jax.Array:
    """bool [B, L]: where the id differs from that of the step before, in the order of the scan; the
    first step goes on from the initial state, whatever its segment."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (0, 1) if reverse else (1, 0)))
