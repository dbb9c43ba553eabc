"""The state space dual of Mamba-2 (Dao and Gu, arXiv 2405.21060, section 6): a scan with one decay
a head, solved by matmuls.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T
    y[t] = h[t] C[t] + D x[t]

with h [P, N] per row and head, reset to zero where a new segment begins. Unrolled from a state h,
with a(t, s) = exp(A (dt[s+1] + ... + dt[t])) between steps of one segment and zero between others,

    y[t] = sum over s <= t of a(t, s) dt[s] (C[t] . B[s]) x[s] + a(t, start) h C[t] + D x[t]

which is a masked matrix product for a chunk of steps, from the state before it; those states are a
scan over chunks. A loop takes a span of chunks at a time, solves all of them at once and carries the
state to the next span; it reads a span where it lies and writes its results where they belong. The
backward pass keeps the inputs as they came and the states between spans, and differentiates each span
anew. Neither a state of every step nor the matrices of all chunks exist at any time.

Decays, their sums and states are fp32. Matmuls take operands in the dtype of x, also those of the
backward pass, and sum in fp32.

Letters: B batch, L length, H heads, P width of a head, N state size, G groups of heads that share B
and C, R heads of such a group; K chunks of Q steps.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.ops.selective_scan.inputs import step_size
from storm_jax.ops.spans import Span, over_spans, segment_starts, varying_alike

# Steps of a chunk, and how many chunks are solved at once; by backend.
SIZES = {"cpu": (64, 8)}
SIZES_ELSEWHERE = (256, 32)
# exp of it is zero in fp32, and so is every decay over such a step: a lower one would change nothing
# but the rounding of the sums.
LOG_ZERO = -104.0


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    *,
    dt_bias: jax.Array | None = None,
    reverse: bool = False,
    h0: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the scan over the second axis.

    Args:
      x: [B, L, H, P].
      dt: [B, L, H]. With `dt_bias`, softplus(dt + dt_bias) is applied in fp32, else `dt` is the
        step size itself.
      A: [H], negative.
      B, C: [B, L, G, N]; head h reads group h // (H / G).
      D: [H].
      dt_bias: [H].
      reverse: scan from the end to the start.
      h0: [B, H, P, N], the state before the first step; zero when None.
      segment_ids: int [B, L]; the state is reset to zero where the id changes.
      chunk: steps per chunk; None for what suits the backend.

    Returns:
      y [B, L, H, P] in the dtype of `x`; h_last [B, H, P, N] fp32, the state after the last step.
    """
    batch, length, heads, width = x.shape
    if heads % B.shape[2]:
        raise ValueError(f"{heads} heads of x do not divide into the {B.shape[2]} groups of B")
    default_chunk, chunks = SIZES.get(jax.default_backend(), SIZES_ELSEWHERE)
    chunk = default_chunk if chunk is None else chunk
    how = How(chunk, min(chunk * chunks, length), reverse)
    reset = None if segment_ids is None else segment_starts(segment_ids, reverse)
    if h0 is None:
        h0 = jnp.zeros((batch, heads, width, B.shape[3]), jnp.float32)
    shared = jax.tree.map(lambda v: v.astype(jnp.float32), Shared(A, D, dt_bias))
    arrays = (Steps(x, dt, B, C), shared, reset, h0.astype(jnp.float32))
    return _scan(how, *varying_alike(arrays))


class How(NamedTuple):
    chunk: int  # steps
    span: int  # steps of the chunks that are solved at once
    reverse: bool  # from the end to the start


class Steps(NamedTuple):
    """What is new at every step, for the whole length or a span; also its gradient."""

    x: jax.Array  # [B, L, H, P]
    dt: jax.Array  # [B, L, H], before the softplus when there is a bias
    B: jax.Array  # [B, L, G, N]
    C: jax.Array  # [B, L, G, N]


class Shared(NamedTuple):
    """What all steps share, fp32; also its gradient."""

    A: jax.Array  # [H]
    D: jax.Array  # [H]
    dt_bias: jax.Array | None  # [H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    how: How, steps: Steps, shared: Shared, reset: jax.Array | None, h0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y [B, L, H, P] and the last state [B, H, P, N]; the state is zero before the steps of `reset`
    [B, L]."""
    return _scan_forward(how, steps, shared, reset, h0)[0]


def _scan_forward(
    how: How, steps: Steps, shared: Shared, reset: jax.Array | None, h0: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    def body(carry: tuple, span: Span) -> tuple:
        h, y, boundaries = carry
        boundaries = jax.lax.dynamic_update_index_in_dim(boundaries, h, span.number, 0)
        steps_here, reset_here = span.read((steps, reset))
        out, h = _solve(how, steps_here, reset_here, shared, h)
        return h, span.write(y, out), boundaries

    length = steps.x.shape[1]
    boundaries = jnp.zeros_like(h0, shape=(-(-length // how.span), *h0.shape))
    carry = (h0, jnp.zeros_like(steps.x), boundaries)
    h, y, boundaries = over_spans(body, carry, length, how.span, how.reverse)
    return (y, h), (steps, shared, reset, boundaries)


def _scan_backward(
    how: How, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Steps, Shared, np.ndarray | None, jax.Array]:
    steps, shared, reset, boundaries = residuals
    dy, dh_last = cotangents

    def body(carry: tuple, span: Span) -> tuple:
        dh, grads, shared_grads = carry
        steps_here, reset_here, dy_here = span.read((steps, reset, dy))
        h = jax.lax.dynamic_index_in_dim(boundaries, span.number, 0, keepdims=False)

        def solve(steps: Steps, shared: Shared, h: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _solve(how, steps, reset_here, shared, h)

        _, pull_back = jax.vjp(solve, steps_here, shared, h)
        here, shared_here, dh = pull_back((dy_here, dh))
        return dh, span.write(grads, here), jax.tree.map(jnp.add, shared_grads, shared_here)

    carry = (dh_last, *jax.tree.map(jnp.zeros_like, (steps, shared)))
    dh, grads, shared_grads = over_spans(body, carry, steps.x.shape[1], how.span, not how.reverse)
    no_grad = None if reset is None else np.zeros(reset.shape, jax.dtypes.float0)
    return grads, shared_grads, no_grad, dh


_scan.defvjp(_scan_forward, _scan_backward)


# One span, all chunks at once.


def _solve(
    how: How, steps: Steps, reset: jax.Array | None, shared: Shared, h: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y [B, L, H, P] of a span and the state [B, H, P, N] after it, from the one before it."""
    batch, length, heads, width = steps.x.shape
    groups, state = steps.B.shape[2:]
    chunk = min(how.chunk, length)
    per_head = (groups, heads // groups)  # G, R
    dot = functools.partial(_dot, dtype=steps.x.dtype)

    def cut(v: jax.Array, *axes: int) -> jax.Array:
        """[B, L, ...] -> [B, K, Q, *axes]; steps of size zero at the end leave the state as it is."""
        v = jnp.pad(v, ((0, 0), (0, -length % chunk), *((0, 0),) * (v.ndim - 2)))
        return v.reshape(batch, -1, chunk, *axes)

    # In fp32, so that an array's gradients are summed before they are rounded.
    x = cut(steps.x, *per_head, width).astype(jnp.float32)  # [B, K, Q, G, R, P]
    B, C = (
        cut(v, groups, state).astype(jnp.float32) for v in (steps.B, steps.C)
    )  # [B, K, Q, G, N]
    dt = cut(step_size(steps.dt, shared.dt_bias), *per_head)  # [B, K, Q, G, R]
    u = dt[..., None] * x  # [B, K, Q, G, R, P]
    log_decay = jnp.moveaxis(dt * shared.A.reshape(1, 1, 1, *per_head), 2, -1)  # [B, K, G, R, Q]
    resets = None if reset is None else cut(reset.astype(jnp.int32))[:, :, None, None]
    decay = _Decay(log_decay, resets, how.reverse)

    scores = dot("bkqgn,bksgn->bkgqs", C, B)
    weights = scores[:, :, :, None] * decay.between()  # [B, K, G, R, Q, Q]
    y = dot("bkgrqs,bksgrp->bkqgrp", weights, u)

    added = dot("bkqgrp,bkqgn->bkgrpn", _over_width(decay.to_end()) * u, B)  # to h by each chunk
    h = h.reshape(batch, *per_head, width, state)
    before, h = _states(decay.whole(), added, h, how.reverse)  # [B, K, G, R, P, N]
    y += _over_width(decay.from_start()) * dot("bkqgn,bkgrpn->bkqgrp", C, before)
    y += shared.D.reshape(1, 1, 1, *per_head, 1) * x

    y = y.reshape(batch, -1, heads, width)[:, :length].astype(steps.x.dtype)
    return y, h.reshape(batch, heads, width, state)


def _over_width(v: jax.Array) -> jax.Array:
    """[B, K, G, R, Q] -> [B, K, Q, G, R, 1]."""
    return jnp.moveaxis(v, -1, 2)[..., None]


def _states(
    decay: jax.Array, added: jax.Array, h: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """The state before each chunk and the one after the last.

    Args:
      decay: [B, K, G, R], of a state over each chunk.
      added: [B, K, G, R, P, N], to the state by each chunk.
      h: [B, G, R, P, N], the state before the first chunk.

    Returns:
      [B, K, G, R, P, N] and [B, G, R, P, N].
    """

    def combine(left: tuple, right: tuple) -> tuple:
        return right[0] * left[0], right[0] * left[1] + right[1]

    first, last = (-1, 0) if reverse else (0, -1)
    decay = decay[..., None, None]
    added = added.at[:, first].add(decay[:, first] * h)
    _, after = jax.lax.associative_scan(combine, (decay, added), reverse=reverse, axis=1)
    around = [after[:, 1:], h[:, None]] if reverse else [h[:, None], after[:, :-1]]
    return jnp.concatenate(around, axis=1), after[:, last]


class _Decay:
    """Decays over the steps of each chunk.

    Only sums of logs over the steps between two go through exp, which are zero or less; those across a
    reset are masked before it, so that gradients are finite.
    """

    def __init__(self, log_decay: jax.Array, resets: jax.Array | None, reverse: bool) -> None:
        """
        Args:
          log_decay: [..., Q], at each step.
          resets: int [..., Q], one where the state before the step is set to zero; axes of size 1
            where heads are alike. None without segments.
          reverse: whether the last step is the chunk's first.
        """
        self.size, self.reverse = log_decay.shape[-1], reverse
        log_decay = jnp.maximum(log_decay, LOG_ZERO)
        # A sum over few steps is the difference of two over many, which may be large. So that it is
        # exact nevertheless, they are summed in two parts: multiples of what fp32 can hold at that
        # size, whose sums have no error, and what remains, whose sums are small.
        unit = 2.0 ** (math.ceil(math.log2(-LOG_ZERO * self.size)) - 24)
        coarse = jax.lax.stop_gradient(jnp.round(log_decay / unit) * unit)
        self.sums = [self._cumsum(v) for v in (coarse, log_decay - coarse)]
        self.resets = None if resets is None else self._cumsum(resets)

    def between(self) -> jax.Array:
        """[..., Q, Q], of what step s (the last axis) adds until after step t."""
        log = self._log(lambda sums: sums[..., :, None] - sums[..., None, :])
        before = np.tri(self.size, k=-1, dtype=np.bool_)  # whether s comes before t
        before = before.T if self.reverse else before
        # The diagonal is a constant: its gradients, which can be large, do not have to cancel.
        constant = np.where(np.eye(self.size, dtype=np.bool_), np.float32(0), np.float32(-np.inf))
        mask, constant = (v.reshape((1,) * (log.ndim - 2) + v.shape) for v in (before, constant))
        if self.resets is not None:
            mask = mask & (self.resets[..., :, None] == self.resets[..., None, :])
        return jnp.exp(jnp.where(mask, log, constant))

    def from_start(self) -> jax.Array:
        """[..., Q], of the state before the chunk until after each step."""
        log = self._log(lambda sums: sums)
        if self.resets is not None:
            log = jnp.where(self.resets == 0, log, -jnp.inf)
        return jnp.exp(log)

    def to_end(self) -> jax.Array:
        """[..., Q], of what each step adds until after the chunk."""
        log = self._log(lambda sums: self._last(sums) - sums)
        if self.resets is not None:
            log = jnp.where(self.resets == self._last(self.resets), log, -jnp.inf)
        return jnp.exp(log)

    def whole(self) -> jax.Array:
        """[...], of the state before the chunk until after it."""
        return self._last(self.from_start())[..., 0]

    def _log(self, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`of` the sums, which it is linear in."""
        coarse, fine = self.sums
        return of(coarse) + of(fine)

    def _cumsum(self, v: jax.Array) -> jax.Array:
        return jax.lax.cumsum(v, v.ndim - 1, self.reverse)

    def _last(self, v: jax.Array) -> jax.Array:
        return v[..., :1] if self.reverse else v[..., -1:]


def _dot(subscripts: str, a: jax.Array, b: jax.Array, *, dtype: Any) -> jax.Array:
    """An einsum of two arrays as matmuls of operands in `dtype` that sum in fp32.

    Its gradients are such matmuls, too: those of JAX would be slow ones of fp32 operands.
    """
    return _dot_as(subscripts, dtype, (a.dtype, b.dtype), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dot_as(
    subscripts: str, dtype: Any, dtypes: tuple[Any, Any], a: jax.Array, b: jax.Array
) -> jax.Array:
    return _dot_forward(subscripts, dtype, dtypes, a, b)[0]


def _dot_forward(
    subscripts: str, dtype: Any, dtypes: tuple[Any, Any], a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    a, b = a.astype(dtype), b.astype(dtype)
    return _matmul(subscripts, a, b), (a, b)


def _dot_backward(
    subscripts: str,
    dtype: Any,
    dtypes: tuple[Any, Any],
    operands: tuple[jax.Array, jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    of_a, of_b, of_grad = re.split(",|->", subscripts)
    grad = grad.astype(dtype)
    da = _matmul(f"{of_grad},{of_b}->{of_a}", grad, b)
    db = _matmul(f"{of_grad},{of_a}->{of_b}", grad, a)
    return da.astype(dtypes[0]), db.astype(dtypes[1])


_dot_as.defvjp(_dot_forward, _dot_backward)


def _matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    def fp32(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)  # not TF32

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    if a.dtype == jnp.float32:
        return fp32(a, b)
    # XLA does not have every matmul of bf16 on CPU.
    return jax.lax.platform_dependent(a, b, cpu=fp32, default=narrow)
