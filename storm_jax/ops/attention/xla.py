"""Attention in plain JAX, one block of queries and keys at a time.

A block of logits updates a running maximum and sum, so that memory does not grow with the number of keys; the backward
pass computes it again (Dao, arXiv 2307.08691). On CPU, blocks of keys that no query of a block attends to are skipped.
On other platforms, a block of queries attends to all keys at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.ops.attention.keys import KeyRange
from storm_jax.ops.spans import unify_varying_axes
from storm_jax.sharding import platform

BLOCK = 256  # queries, and keys
_MIN_LOGIT = -1e30  # finite, so that differences of two are not NaN


def attend(q: jax.Array, k: jax.Array, v: jax.Array, keys: KeyRange | None) -> jax.Array:
    """As `storm_jax.ops.attention.attention`, on one device."""
    inputs = unify_varying_axes((q, k, v, keys))
    queries, length = _even(q.shape[1], BLOCK), k.shape[1]
    # A loop over small blocks, whose end is not known, would wait for the host of a GPU.
    if platform() != "cpu":
        return _flash(*inputs, _Blocks(queries, length))
    blocks = _Blocks(queries, _even(length, max(BLOCK, BLOCK**2 // q.shape[1])))
    if len(q) == 1:
        return _flash(*inputs, blocks)

    def attend_row(row: tuple) -> jax.Array:
        return _flash(*jax.tree.map(lambda x: x[None], row), blocks)[0]

    return jax.lax.map(attend_row, inputs)  # the logits of a block fit into the caches of a core


class _Blocks(NamedTuple):
    """Sizes of blocks. The last block of queries is padded, that of keys overlaps the one before."""

    queries: int
    keys: int


def _even(length: int, size: int) -> int:
    """The size of blocks of at most `size` that cut a length most evenly."""
    return -(-length // -(-length // size))


class _Queries(NamedTuple):
    """A block of queries. R rows are those of all query heads that share a key head.

    Attributes:
      q: [B, H_kv, R, K].
      first, last: int [B, 1, R]; None without a range.
    """

    q: jax.Array
    first: jax.Array | None
    last: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: KeyRange | None, blocks: _Blocks
) -> jax.Array:
    return _flash_forward(q, k, v, keys, blocks)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: KeyRange | None, blocks: _Blocks
) -> tuple[jax.Array, tuple]:
    kv_heads, length, dtype = k.shape[2], k.shape[1], v.dtype
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, H_kv, T, K]

    def attend(queries: _Queries) -> tuple[jax.Array, jax.Array]:
        def extend(number: jax.Array, carry: tuple) -> tuple:
            largest, total, y = carry
            logits = _logits(queries, k, number, blocks.keys)
            new_largest = jnp.maximum(largest, logits.max(-1, keepdims=True))
            weights = jnp.exp(logits - new_largest)
            old = jnp.exp(largest - new_largest)
            new = _dot("bhrt,bhtk->bhrk", weights.astype(dtype), _slice(v, number, blocks.keys))
            return new_largest, total * old + weights.sum(-1, keepdims=True), y * old + new

        rows = queries.q.shape[:3]
        start = (
            jnp.full((*rows, 1), _MIN_LOGIT),
            jnp.zeros((*rows, 1)),
            jnp.zeros(queries.q.shape),
        )
        largest, total, y = _for_blocks(queries, length, blocks.keys, extend, start)
        return y / total, largest + jnp.log(total)

    y, log_total = jax.lax.map(attend, _cut(q, kv_heads, keys, blocks.queries))
    y = _join(y, q.shape).astype(q.dtype)
    return y, (q, k, v, keys, y, log_total)


def _flash_backward(blocks: _Blocks, saved: tuple, dy: jax.Array) -> tuple:
    q, k, v, keys, y, log_total = saved
    kv_heads, length, dtype = k.shape[1], k.shape[2], q.dtype
    scale = q.shape[-1] ** -0.5
    product = dy.astype(jnp.float32) * y.astype(jnp.float32)
    product = product.sum(-1, keepdims=True)  # [B, S, H, 1]

    def attend(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        queries, dy, product, log_total = inputs

        def extend(number: jax.Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            weights = jnp.exp(_logits(queries, k, number, blocks.keys) - log_total)
            d_weights = _dot("bhrk,bhtk->bhrt", dy, _slice(v, number, blocks.keys))
            d_logits = (weights * (d_weights - product)).astype(dtype)
            dq += _dot("bhrt,bhtk->bhrk", d_logits, _slice(k, number, blocks.keys))
            dk = _add(dk, _dot("bhrt,bhrk->bhtk", d_logits, queries.q), number, blocks.keys)
            dv = _add(dv, _dot("bhrt,bhrk->bhtk", weights.astype(dtype), dy), number, blocks.keys)
            return dq, dk, dv

        start = (jnp.zeros(queries.q.shape), *carry)
        dq, *carry = _for_blocks(queries, length, blocks.keys, extend, start)
        return tuple(carry), dq

    inputs = (
        _cut(q, kv_heads, keys, blocks.queries),
        _cut(dy, kv_heads, None, blocks.queries).q,
        _cut(product, kv_heads, None, blocks.queries).q,
        log_total,
    )
    start = unify_varying_axes((k, jnp.zeros(k.shape), jnp.zeros(k.shape)))[1:]
    (dk, dv), dq = jax.lax.scan(attend, start, inputs)
    dq = (scale * _join(dq, q.shape)).astype(q.dtype)
    dk, dv = ((factor * d).swapaxes(1, 2).astype(k.dtype) for factor, d in ((scale, dk), (1, dv)))
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


def _cut(x: jax.Array, kv_heads: int, keys: KeyRange | None, size: int) -> _Queries:
    """Blocks [N, ...] of queries [B, S, H, K]; the last one is padded."""
    batch, length, heads, channels = x.shape
    group, count = heads // kv_heads, -(-length // size)
    padding = [(0, 0), (0, count * size - length)]

    def repeat(x: jax.Array) -> jax.Array:  # [B, S] -> [N, B, 1, R]
        x = jnp.pad(x, padding, "edge").reshape(batch, count, 1, size)
        x = jnp.broadcast_to(x, (batch, count, group, size)).reshape(batch, count, 1, -1)
        return x.swapaxes(0, 1)

    q = jnp.pad(x, [*padding, (0, 0), (0, 0)])
    q = q.reshape(batch, count, size, kv_heads, group, channels).transpose(1, 0, 3, 4, 2, 5)
    q = q.reshape(count, batch, kv_heads, group * size, channels)
    if keys is None:
        return _Queries(q, None, None)
    return _Queries(q, repeat(keys.first), repeat(keys.last))


def _join(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_cut`: [N, B, H_kv, R, K] -> [B, S, H, K]."""
    batch, length, heads, channels = shape
    count, _, kv_heads, rows, _ = blocks.shape
    group = heads // kv_heads
    x = blocks.reshape(count, batch, kv_heads, group, rows // group, channels)
    x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, channels)
    return x[:, :length]


def _for_blocks(
    queries: _Queries, length: int, size: int, body: Callable[[jax.Array, Any], Any], carry: Any
) -> Any:
    """Computes `carry = body(number, carry)` for each block of keys that any query attends to."""
    count = -(-length // size)
    carry = unify_varying_axes((queries, carry))[1]
    if count == 1:
        return body(jnp.int32(0), carry)
    if queries.first is None or queries.last is None:
        return jax.lax.fori_loop(0, count, body, carry)
    first, last = queries.first.min() // size, queries.last.max() // size

    def unfinished(state: tuple) -> jax.Array:
        number, _ = state
        return (number <= last) & (number < count)  # the constant bounds the cost of the loop

    def step(state: tuple) -> tuple:
        number, carry = state
        return number + 1, body(number, carry)

    return jax.lax.while_loop(unfinished, step, (first, carry))[1]


def _logits(queries: _Queries, k: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """fp32 logits [B, H_kv, R, C] of a block of queries and a block of keys."""
    logits = _dot("bhrk,bhtk->bhrt", queries.q, _slice(k, number, size)) * k.shape[-1] ** -0.5
    index = _start(k, number, size) + jnp.arange(size)[None, None, None]
    is_seen = index >= number * size  # the last block overlaps the one before
    if queries.first is not None and queries.last is not None:
        is_seen &= (queries.first[..., None] <= index) & (index <= queries.last[..., None])
    elif k.shape[2] % size == 0:
        return logits
    return jnp.where(is_seen, logits, _MIN_LOGIT)


def _start(x: jax.Array, number: jax.Array, size: int) -> jax.Array:
    return jnp.minimum(number * size, x.shape[2] - size)


def _slice(x: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """A block [B, H_kv, C, K] of keys or values [B, H_kv, T, K]."""
    return jax.lax.dynamic_slice_in_dim(x, _start(x, number, size), size, axis=2)


def _add(x: jax.Array, value: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """Adds to a block of keys or values."""
    value += _slice(x, number, size)
    return jax.lax.dynamic_update_slice_in_dim(x, value, _start(x, number, size), axis=2)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
