"""State space duality (SSD), the scan of Mamba-2 (Dao and Gu, arXiv 2405.21060, section 6).

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T
    y[t] = h[t] C[t] + D x[t]

The state h is [P, N] per batch row and head, and is reset to zero at the start of each segment. A is a
scalar per head. Unrolled from a state h,

    y[t] = sum over s <= t of a(t, s) dt[s] (C[t] . B[s]) x[s]  +  a(t, start) h C[t]  +  D x[t]

where a(t, s) = exp(A (dt[s+1] + ... + dt[t])) within a segment and zero across segments. For a chunk of
steps this is a masked matrix product that needs only the state before the chunk, and those states are
a short scan over chunks.

A loop processes one span of chunks at a time: it solves the chunks of a span in parallel and carries
the state to the next span. The backward pass stores the inputs and the states between spans, and
recomputes everything else span by span. Memory never contains the state of every step or the matrices
of all chunks.

Precision: decays, their sums and states are fp32. Matmuls, including those of the backward pass, take
operands in the dtype of x and accumulate in fp32.

Letters: B batch, L length, H heads, P head width, N state size, G groups of heads that share B and C,
R heads per group, K chunks, Q steps per chunk.
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
from jax.sharding import PartitionSpec as P

from storm_jax.ops import sequence_shards
from storm_jax.ops.selective_scan.inputs import step_size
from storm_jax.ops.spans import Span, loop_over_spans, segment_starts, unify_varying_axes
from storm_jax.sharding import platform

# (steps per chunk, chunks per span) by platform.
SIZES = {"cpu": (64, 8)}
DEFAULT_SIZES = (256, 32)
# exp(LOG_ZERO) is zero in fp32. Log decays are clipped to it: smaller ones would not change any decay,
# only make the sums of logs less precise.
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
      dt: [B, L, H]. The step size, or with `dt_bias` its pre-activation: the step size is then
        softplus(dt + dt_bias), computed in fp32.
      A: [H], negative.
      B, C: [B, L, G, N]; head h reads group h // (H / G).
      D: [H].
      dt_bias: [H].
      reverse: scan from the last step to the first.
      h0: [B, H, P, N], the initial state; None means zeros.
      segment_ids: int [B, L]; the state is reset to zero where the id changes.
      chunk: steps per chunk; None selects the default of the platform.

    Returns:
      y [B, L, H, P] in the dtype of `x`, and the final state [B, H, P, N] in fp32.

    Raises:
      ValueError: the number of heads is not a multiple of the number of groups.
    """
    batch, length, heads, width = x.shape
    if heads % B.shape[2]:
        raise ValueError(
            f"x has {heads} heads, which is not a multiple of the {B.shape[2]} groups of B"
        )
    default_chunk, chunks_per_span = SIZES.get(platform(), DEFAULT_SIZES)
    chunk = default_chunk if chunk is None else chunk
    local_length = sequence_shards.local_length(length)
    options = Options(chunk=chunk, span=min(chunk * chunks_per_span, local_length), reverse=reverse)
    if h0 is None:
        h0 = jnp.zeros((batch, heads, width, B.shape[3]), jnp.float32)
    params = jax.tree.map(lambda v: v.astype(jnp.float32), Params(A, D, dt_bias))
    steps, h0 = Steps(x=x, dt=dt, B=B, C=C), h0.astype(jnp.float32)
    if sequence_shards.is_sharded(length):
        return _scan_over_mesh(options, steps, params, segment_ids, h0)
    reset = None if segment_ids is None else segment_starts(segment_ids, reverse)
    return _scan(options, *unify_varying_axes((steps, params, reset, h0)))


class Options(NamedTuple):
    """Static options of the scan."""

    chunk: int  # steps per chunk
    span: int  # steps per span, whose chunks are solved in parallel
    reverse: bool  # scan from the last step to the first


class Steps(NamedTuple):
    """Inputs per step, of the whole sequence or of a span; also used for their gradients."""

    x: jax.Array  # [B, L, H, P]
    dt: jax.Array  # [B, L, H], before the softplus if there is a bias
    B: jax.Array  # [B, L, G, N]
    C: jax.Array  # [B, L, G, N]


class Params(NamedTuple):
    """Inputs shared by all steps, in fp32; also used for their gradients."""

    A: jax.Array  # [H]
    D: jax.Array  # [H]
    dt_bias: jax.Array | None  # [H]


def _scan_over_mesh(
    options: Options,
    steps: Steps,
    params: Params,
    segment_ids: jax.Array | None,
    h0: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`_scan` of a sequence that is sharded over the mesh: each device has its rows, steps and heads."""
    x = sequence_shards.steps_spec(steps.x.shape, "inner", None)
    groups = sequence_shards.steps_spec(steps.B.shape, "inner", None)
    if steps.B.shape[2] > 1 and groups[2] != x[2]:  # heads would read groups of another device
        x, groups = (P(*spec[:2], None, None) for spec in (x, groups))
    h, heads = P(x[0], x[2], None, None), P(x[2])
    if segment_ids is None:
        segment_ids = jnp.zeros(steps.x.shape[:2], jnp.int32)
    step_specs: dict[str, Any] = {"x": x, "dt": P(*x[:3]), "B": groups, "C": groups}
    in_specs = (Steps(**step_specs), jax.tree.map(lambda _: heads, params), P(*x[:2]), h)
    scan = jax.shard_map(
        functools.partial(_scan_shard, options), in_specs=in_specs, out_specs=(x, h)
    )
    return scan(steps, params, segment_ids, h0)


def _scan_shard(
    options: Options, steps: Steps, params: Params, segment_ids: jax.Array, h0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_scan` of a shard; h0 and the final state are those of the whole sequence."""
    steps, params, segment_ids, h0 = unify_varying_axes((steps, params, segment_ids, h0))

    def decay(size: jax.Array) -> jax.Array:  # [..., H] -> [..., H, 1, 1]
        A = params.A.reshape((1,) * (size.ndim - 1) + params.A.shape)
        return jnp.exp(size * A)[..., None, None]

    def read(steps: tuple, decays: jax.Array, h: jax.Array) -> jax.Array:
        C = steps[1]  # [B, Q, G, N]
        states = h.reshape(C.shape[0], C.shape[2], -1, *h.shape[2:])  # [B, G, R, P, N]
        y = _dot("bqgn,bgrpn->bqgrp", C, states, dtype=C.dtype)
        return decays[..., 0] * y.reshape(*y.shape[:2], -1, y.shape[-1])  # [B, Q, H, P]

    return sequence_shards.scan_shard(
        lambda starts, h0: _scan(options, steps, params, starts, h0),
        (steps.dt, steps.C),
        segment_ids,
        h0,
        step_size=lambda steps: step_size(steps[0], params.dt_bias),
        decay=decay,
        read=read,
        reverse=options.reverse,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    options: Options, steps: Steps, params: Params, reset: jax.Array | None, h0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns y [B, L, H, P] and the final state [B, H, P, N]; `reset` [B, L] marks segment starts."""
    return _scan_forward(options, steps, params, reset, h0)[0]


def _scan_forward(
    options: Options, steps: Steps, params: Params, reset: jax.Array | None, h0: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    def body(carry: tuple, span: Span) -> tuple:
        h, y, span_states = carry
        span_states = jax.lax.dynamic_update_index_in_dim(span_states, h, span.number, 0)
        span_steps, span_reset = span.read((steps, reset))
        span_y, h = _solve_span(options, span_steps, span_reset, params, h)
        return h, span.write(y, span_y), span_states

    length = steps.x.shape[1]
    span_states = jnp.zeros_like(h0, shape=(-(-length // options.span), *h0.shape))
    carry = (h0, jnp.zeros_like(steps.x), span_states)
    h, y, span_states = loop_over_spans(body, carry, length, options.span, options.reverse)
    return (y, h), (steps, params, reset, span_states)


def _scan_backward(
    options: Options, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Steps, Params, np.ndarray | None, jax.Array]:
    steps, params, reset, span_states = residuals
    dy, dh_last = cotangents

    def body(carry: tuple, span: Span) -> tuple:
        dh, step_grads, param_grads = carry
        span_steps, span_reset, span_dy = span.read((steps, reset, dy))
        h = jax.lax.dynamic_index_in_dim(span_states, span.number, 0, keepdims=False)

        def solve(steps: Steps, params: Params, h: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _solve_span(options, steps, span_reset, params, h)

        _, pullback = jax.vjp(solve, span_steps, params, h)
        span_step_grads, span_param_grads, dh = pullback((span_dy, dh))
        param_grads = jax.tree.map(jnp.add, param_grads, span_param_grads)
        return dh, span.write(step_grads, span_step_grads), param_grads

    carry = (dh_last, *jax.tree.map(jnp.zeros_like, (steps, params)))
    dh, step_grads, param_grads = loop_over_spans(
        body, carry, steps.x.shape[1], options.span, not options.reverse
    )
    reset_grad = None if reset is None else np.zeros(reset.shape, jax.dtypes.float0)
    return step_grads, param_grads, reset_grad, dh


_scan.defvjp(_scan_forward, _scan_backward)


def _solve_span(
    options: Options, steps: Steps, reset: jax.Array | None, params: Params, h: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Solves all chunks of a span in parallel.

    Args:
      h: [B, H, P, N], the state before the span.

    Returns:
      y [B, L, H, P] and the state after the span.
    """
    batch, length, heads, width = steps.x.shape
    groups, d_state = steps.B.shape[2:]
    chunk = min(options.chunk, length)
    head_axes = (groups, heads // groups)  # G, R
    dot = functools.partial(_dot, dtype=steps.x.dtype)

    def to_chunks(v: jax.Array, *axes: int) -> jax.Array:
        """[B, L, ...] -> [B, K, Q, *axes], zero-padded: steps of size zero do not change the state."""
        v = jnp.pad(v, ((0, 0), (0, -length % chunk), *((0, 0),) * (v.ndim - 2)))
        return v.reshape(batch, -1, chunk, *axes)

    # In fp32, so that the gradients of an array are summed before they are rounded.
    x = to_chunks(steps.x, *head_axes, width).astype(jnp.float32)  # [B, K, Q, G, R, P]
    B = to_chunks(steps.B, groups, d_state).astype(jnp.float32)  # [B, K, Q, G, N]
    C = to_chunks(steps.C, groups, d_state).astype(jnp.float32)
    dt = to_chunks(step_size(steps.dt, params.dt_bias), *head_axes)  # [B, K, Q, G, R]
    dtx = dt[..., None] * x  # [B, K, Q, G, R, P]
    log_decay = jnp.moveaxis(dt * params.A.reshape(1, 1, 1, *head_axes), 2, -1)  # [B, K, G, R, Q]
    resets = None if reset is None else to_chunks(reset.astype(jnp.int32))[:, :, None, None]
    decay = _Decay(log_decay, resets, options.reverse)

    scores = dot("bkqgn,bksgn->bkgqs", C, B)
    weights = scores[:, :, :, None] * decay.between()  # [B, K, G, R, Q, Q]
    y = dot("bkgrqs,bksgrp->bkqgrp", weights, dtx)

    chunk_inputs = dot("bkqgrp,bkqgn->bkgrpn", _per_step(decay.to_end()) * dtx, B)
    h = h.reshape(batch, *head_axes, width, d_state)
    chunk_states, h = _scan_chunks(decay.whole(), chunk_inputs, h, options.reverse)
    y += _per_step(decay.from_start()) * dot("bkqgn,bkgrpn->bkqgrp", C, chunk_states)
    y += params.D.reshape(1, 1, 1, *head_axes, 1) * x

    y = y.reshape(batch, -1, heads, width)[:, :length].astype(steps.x.dtype)
    return y, h.reshape(batch, heads, width, d_state)


def _per_step(v: jax.Array) -> jax.Array:
    """[B, K, G, R, Q] -> [B, K, Q, G, R, 1]."""
    return jnp.moveaxis(v, -1, 2)[..., None]


def _scan_chunks(
    decay: jax.Array, inputs: jax.Array, h: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Computes the state before each chunk and the state after the last one.

    Args:
      decay: [B, K, G, R], of a state over each chunk.
      inputs: [B, K, G, R, P, N], what each chunk adds to the state.
      h: [B, G, R, P, N], the state before the first chunk.

    Returns:
      [B, K, G, R, P, N] and [B, G, R, P, N].
    """

    def combine(left: tuple, right: tuple) -> tuple:
        return right[0] * left[0], right[0] * left[1] + right[1]

    first, last = (-1, 0) if reverse else (0, -1)
    decay = decay[..., None, None]
    inputs = inputs.at[:, first].add(decay[:, first] * h)
    _, after = jax.lax.associative_scan(combine, (decay, inputs), reverse=reverse, axis=1)
    before = [after[:, 1:], h[:, None]] if reverse else [h[:, None], after[:, :-1]]
    return jnp.concatenate(before, axis=1), after[:, last]


class _Decay:
    """Decays between the steps of each chunk.

    Every decay is exp of a sum of log decays over consecutive steps, which is at most zero. Decays
    across a reset are masked before exp, so that gradients stay finite.
    """

    def __init__(self, log_decay: jax.Array, resets: jax.Array | None, reverse: bool) -> None:
        """
        Args:
          log_decay: [..., Q], of each step.
          resets: int [..., Q], one where the state is reset before the step; None if it never is.
            Axes over which it is constant may have size 1.
          reverse: whether the chunk is scanned from its last step to its first.
        """
        self.size, self.reverse = log_decay.shape[-1], reverse
        log_decay = jnp.maximum(log_decay, LOG_ZERO)
        # The sum over a few steps is the difference of two cumulative sums, which may be much larger.
        # To make it exact nevertheless, each log is split into a multiple of `unit` and a remainder.
        # Sums of multiples fit into fp32 without rounding, and sums of remainders are small.
        unit = 2.0 ** (math.ceil(math.log2(-LOG_ZERO * self.size)) - 24)
        coarse = jax.lax.stop_gradient(jnp.round(log_decay / unit) * unit)
        self.sums = [self._cumsum(v) for v in (coarse, log_decay - coarse)]
        self.resets = None if resets is None else self._cumsum(resets)

    def between(self) -> jax.Array:
        """[..., Q, Q]: at (t, s), the decay at step t of what step s added; zero if s is later."""
        log = self._log(lambda sums: sums[..., :, None] - sums[..., None, :])
        earlier = np.tri(self.size, k=-1, dtype=np.bool_)  # whether s precedes t
        earlier = earlier.T if self.reverse else earlier
        # The diagonal is a constant, so that no large gradients have to cancel there.
        constant = np.where(np.eye(self.size, dtype=np.bool_), np.float32(0), np.float32(-np.inf))
        mask, constant = (v.reshape((1,) * (log.ndim - 2) + v.shape) for v in (earlier, constant))
        if self.resets is not None:
            mask = mask & (self.resets[..., :, None] == self.resets[..., None, :])
        return jnp.exp(jnp.where(mask, log, constant))

    def from_start(self) -> jax.Array:
        """[..., Q]: the decay at each step of the state before the chunk."""
        log = self._log(lambda sums: sums)
        if self.resets is not None:
            log = jnp.where(self.resets == 0, log, -jnp.inf)
        return jnp.exp(log)

    def to_end(self) -> jax.Array:
        """[..., Q]: the decay at the end of the chunk of what each step added."""
        log = self._log(lambda sums: self._last(sums) - sums)
        if self.resets is not None:
            log = jnp.where(self.resets == self._last(self.resets), log, -jnp.inf)
        return jnp.exp(log)

    def whole(self) -> jax.Array:
        """[...]: the decay of a state over the whole chunk."""
        return self._last(self.from_start())[..., 0]

    def _log(self, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Applies a linear function to the cumulative sums."""
        coarse, remainder = self.sums
        return function(coarse) + function(remainder)

    def _cumsum(self, v: jax.Array) -> jax.Array:
        return jax.lax.cumsum(v, v.ndim - 1, self.reverse)

    def _last(self, v: jax.Array) -> jax.Array:
        return v[..., :1] if self.reverse else v[..., -1:]


def _dot(subscripts: str, a: jax.Array, b: jax.Array, *, dtype: Any) -> jax.Array:
    """Einsum of two arrays with operands cast to `dtype` and fp32 accumulation.

    The custom gradient casts its operands too. JAX's own would multiply in fp32, which is slow.
    """
    return _dot_with_dtypes(subscripts, dtype, (a.dtype, b.dtype), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dot_with_dtypes(
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
    a_axes, b_axes, out_axes = re.split(",|->", subscripts)
    grad = grad.astype(dtype)
    da = _matmul(f"{out_axes},{b_axes}->{a_axes}", grad, b)
    db = _matmul(f"{out_axes},{a_axes}->{b_axes}", grad, a)
    return da.astype(dtypes[0]), db.astype(dtypes[1])


_dot_with_dtypes.defvjp(_dot_forward, _dot_backward)


def _matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    def fp32(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)  # not TF32

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    if a.dtype == jnp.float32:
        return fp32(a, b)
    # XLA does not implement every bf16 matmul on CPU.
    return jax.lax.platform_dependent(a, b, cpu=fp32, default=narrow)
