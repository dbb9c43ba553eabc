"""Loops over spans of a sequence that read and write slices in place.

Inputs are sliced one span at a time, so no array is padded, transposed or cast as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Span(NamedTuple):
    """Steps [start, start + size) of a sequence."""

    number: jax.Array | int  # counted from the start of the sequence
    start: jax.Array | int
    size: int

    def read(self, arrays: Any) -> Any:
        """Slices a tree of arrays [B, L, ...] to these steps."""
        return jax.tree.map(
            lambda v: jax.lax.dynamic_slice_in_dim(v, self.start, self.size, axis=1), arrays
        )

    def write(self, arrays: Any, values: Any) -> Any:
        """Replaces these steps of a tree of arrays [B, L, ...].

        Values are cast to the arrays' dtypes. With B = 1 they may omit the batch axis.
        """

        def update(array: jax.Array, value: jax.Array) -> jax.Array:
            shape = (array.shape[0], self.size, *array.shape[2:])
            value = value.reshape(shape).astype(array.dtype)
            return jax.lax.dynamic_update_slice_in_dim(array, value, self.start, axis=1)

        return jax.tree.map(update, arrays, values)


def loop_over_spans(
    body: Callable[[Any, Span], Any], carry: Any, length: int, size: int, reverse: bool
) -> Any:
    """Computes `carry = body(carry, span)` for each span of `size` steps and returns the carry.

    Spans run from first to last, or from last to first with `reverse`. The last span of the sequence
    is shorter if `size` does not divide `length`.
    """
    num_full, remainder = divmod(length, size)
    tail = Span(num_full, num_full * size, remainder)

    def step(i: jax.Array, carry: Any) -> Any:
        number = num_full - 1 - i if reverse else i
        return body(carry, Span(number, number * size, size))

    if remainder and reverse:
        carry = body(carry, tail)
    carry = jax.lax.fori_loop(0, num_full, step, carry)
    if remainder and not reverse:
        carry = body(carry, tail)
    return carry


def unify_varying_axes(arrays: Any) -> Any:
    """Inside a `shard_map`, marks all arrays as varying over the union of their varying mesh axes.

    Loops need one such type for everything they carry. The cast also makes autodiff sum the gradient
    of an array that was replicated. Outside a `shard_map` this does nothing.
    """
    axes = {axis for v in jax.tree.leaves(arrays) for axis in jax.typeof(v).mat.varying}

    def cast(v: jax.Array) -> jax.Array:
        return jax.lax.pcast(v, tuple(sorted(axes - jax.typeof(v).mat.varying)), to="varying")

    return jax.tree.map(cast, arrays)


def segment_starts(segment_ids: jax.Array, reverse: bool) -> jax.Array:
    """Returns bool [B, L]: whether a step's id differs from that of the step scanned before it.

    The first step scanned is never a start: it continues from the initial state.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (0, 1) if reverse else (1, 0)))
