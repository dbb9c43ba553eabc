"""The selective scan in plain JAX, chunk by chunk.

A loop over chunks of the sequence carries the state. It slices its inputs and updates its outputs in
place, so no input is padded, transposed or cast as a whole. The recurrence within a chunk is solved in
one of two ways:

  sequential   step by step, which is fastest on CPU.
  associative  all steps in parallel, in log2(Q) rounds, for accelerators.

Letters: B batch, E width, N state size, Q steps per chunk. With B = 1 the batch axis is dropped inside a
chunk: XLA's CPU code for a step is many times slower with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.ops.selective_scan.inputs import Inputs, step_size, step_size_derivative
from storm_jax.ops.spans import Span, loop_over_spans


class Chunk(NamedTuple):
    """The inputs of a chunk, [B, Q, ...], or of one step, [B, ...], in fp32."""

    x: jax.Array  # [..., E]
    dt: jax.Array  # [..., E], the step size, after the softplus
    B: jax.Array  # [..., N]
    C: jax.Array  # [..., N]
    reset: jax.Array  # [...]

    def recurrence(self, A: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the decay a and input u [..., N, E] of h[t] = a[t] h[t-1] + u[t]."""
        decay = jnp.exp(self.dt[..., None, :] * _expand_dims(A, self.dt.ndim + 1))
        decay = jnp.where(self.reset[..., None, None], 0.0, decay)
        return decay, (self.dt * self.x)[..., None, :] * self.B[..., None]


class Options(NamedTuple):
    """Static options of the scan."""

    chunk: int  # steps per chunk
    sequential: bool  # solve chunks step by step instead of by an associative scan
    reverse: bool  # scan from the last step to the first


def forward(
    options: Options, inputs: Inputs, reset: jax.Array, h0: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the outputs.

    Args:
      inputs: of length L.
      reset: bool [B, L]; whether the state is reset before a step.
      h0: [B, N, E] fp32.

    Returns:
      y [B, L, E] in the dtype of x, the final state [B, N, E], and the states before each chunk
      [ceil(L / chunk), B, N, E].
    """
    solve = _solve_sequential if options.sequential else _solve_associative

    def body(carry: tuple, span: Span) -> tuple:
        h, y, chunk_states = carry
        chunk_states = jax.lax.dynamic_update_index_in_dim(chunk_states, h, span.number, 0)
        chunk = _read_chunk(inputs, reset, span)
        h, chunk_y = solve(chunk, inputs.A, h, options.reverse)
        chunk_y += _expand_dims(inputs.D, chunk_y.ndim) * chunk.x
        return h, span.write(y, chunk_y), chunk_states

    length = inputs.x.shape[1]
    h = _squeeze_batch(h0)
    chunk_states = jnp.zeros_like(h, shape=(-(-length // options.chunk), *h.shape))
    carry = (h, jnp.zeros_like(inputs.x), chunk_states)
    h, y, chunk_states = loop_over_spans(body, carry, length, options.chunk, options.reverse)
    return y, h.reshape(h0.shape), chunk_states


def backward(
    options: Options,
    inputs: Inputs,
    reset: jax.Array,
    chunk_states: jax.Array,
    dy: jax.Array,
    dh_last: jax.Array,
) -> tuple[Inputs, jax.Array]:
    """Computes the gradients of the inputs and of h0 from those of the outputs.

    Recomputes the states of each chunk from the state before it.
    """
    solve = _gradients_sequential if options.sequential else _gradients_associative

    def body(carry: tuple, span: Span) -> tuple:
        dh, grads = carry
        chunk = _read_chunk(inputs, reset, span)
        chunk_dy = _read(span, dy).astype(jnp.float32)
        h = jax.lax.dynamic_index_in_dim(chunk_states, span.number, 0, keepdims=False)
        dh, dA, (dx, ddt, dB, dC) = solve(chunk, inputs.A, h, chunk_dy, dh, options.reverse)
        dx += _expand_dims(inputs.D, dx.ndim) * chunk_dy
        ddt *= step_size_derivative(chunk.dt, inputs.dt_bias)
        dbias = None if inputs.dt_bias is None else grads.dt_bias + _sum_leading(ddt, 1)
        dx, ddt, dB, dC = span.write((grads.x, grads.dt, grads.B, grads.C), (dx, ddt, dB, dC))
        grads = Inputs(
            x=dx,
            dt=ddt,
            A=grads.A + dA,
            B=dB,
            C=dC,
            D=grads.D + _sum_leading(chunk_dy * chunk.x, 1),
            dt_bias=dbias,
        )
        return dh, grads

    grads = jax.tree.map(jnp.zeros_like, inputs)
    carry = (_squeeze_batch(dh_last), grads)
    dh, grads = loop_over_spans(body, carry, inputs.x.shape[1], options.chunk, not options.reverse)
    return grads, dh.reshape(dh_last.shape)


def _read_chunk(inputs: Inputs, reset: jax.Array, span: Span) -> Chunk:
    x, B, C = (_read(span, v).astype(jnp.float32) for v in (inputs.x, inputs.B, inputs.C))
    dt = step_size(_read(span, inputs.dt), inputs.dt_bias)
    return Chunk(x=x, dt=dt, B=B, C=C, reset=_read(span, reset))


def _read(span: Span, v: jax.Array) -> jax.Array:
    """[B, L, ...] -> [B, Q, ...]."""
    return _squeeze_batch(span.read(v))


def _squeeze_batch(v: jax.Array) -> jax.Array:
    """Drops the batch axis if its size is 1."""
    return v[0] if v.shape[0] == 1 else v


def _expand_dims(x: jax.Array, ndim: int) -> jax.Array:
    """Prepends axes of size 1."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _sum_leading(x: jax.Array, trailing: int) -> jax.Array:
    """Sums over all but the `trailing` last axes."""
    return x.sum(axis=tuple(range(x.ndim - trailing)))


# Solving a chunk step by step.


def _solve_sequential(
    chunk: Chunk, A: jax.Array, h: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    def step(h: jax.Array, now: Chunk) -> tuple[jax.Array, jax.Array]:
        decay, u = now.recurrence(A)
        h = decay * h + u
        return h, _contract_by_matmul(h, now.C, -2)

    h, y = jax.lax.scan(step, h, _swap_time_axis(chunk, h), reverse=reverse)
    return h, _swap_time_axis(y, h)


def _gradients_sequential(
    chunk: Chunk, A: jax.Array, h: jax.Array, dy: jax.Array, dh: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    def recompute(h: jax.Array, now: Chunk) -> tuple[jax.Array, jax.Array]:
        decay, u = now.recurrence(A)
        return decay * h + u, h

    chunk, dy = _swap_time_axis((chunk, dy), h)
    _, h_before = jax.lax.scan(recompute, h, chunk, reverse=reverse)  # [Q, B, N, E]

    def step(carry: tuple[jax.Array, jax.Array], args: tuple) -> tuple[tuple, tuple]:
        dh, dA = carry
        now, h_before, dy = args
        decay, u = now.recurrence(A)
        dh = dh + dy[..., None, :] * now.C[..., None]
        dA_now, grads = _local_gradients(now, A, decay, u, h_before, dy, dh, _contract_by_matmul)
        return (decay * dh, dA + _sum_leading(dA_now, 2)), grads

    carry = (dh, jnp.zeros_like(A))
    (dh, dA), grads = jax.lax.scan(step, carry, (chunk, h_before, dy), reverse=not reverse)
    return dh, dA, _swap_time_axis(grads, h)


def _swap_time_axis(tree: Any, h: jax.Array) -> Any:
    """[B, Q, ...] <-> [Q, B, ...]; without a batch axis time is already first."""
    return tree if h.ndim == 2 else jax.tree.map(lambda v: v.swapaxes(0, 1), tree)


# Solving a chunk by an associative scan. States are [B, Q, N, E].

TIME_AXIS = -3


def _solve_associative(
    chunk: Chunk, A: jax.Array, h: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    states = _linear_recurrence(*chunk.recurrence(A), h, reverse)
    return _at_end(states, reverse), _contract_by_sum(states, chunk.C, -2)


def _gradients_associative(
    chunk: Chunk, A: jax.Array, h: jax.Array, dy: jax.Array, dh: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    decay, u = chunk.recurrence(A)
    h_before = _shift(_linear_recurrence(decay, u, h, reverse), h, reverse)
    # The adjoint obeys dh[t] = decay[t+1] dh[t+1] + C[t] dy[t]. `dh` is the adjoint of the state after
    # the chunk, as if one more step with decay one followed.
    after = _shift(decay, jnp.ones_like(h), not reverse)
    source = dy[..., None, :] * chunk.C[..., None]
    dh = _linear_recurrence(after, source, dh, not reverse)
    dA, grads = _local_gradients(chunk, A, decay, u, h_before, dy, dh, _contract_by_sum)
    return _at_end(decay * dh, not reverse), _sum_leading(dA, 2), grads


def _linear_recurrence(a: jax.Array, u: jax.Array, h: jax.Array, reverse: bool) -> jax.Array:
    """Computes h[t] = a[t] h[t-1] + u[t] for all t, starting from `h`."""

    def combine(left: tuple, right: tuple) -> tuple:
        return right[0] * left[0], right[0] * left[1] + right[1]

    first = a.shape[TIME_AXIS] - 1 if reverse else 0
    u = u.at[..., first, :, :].add(_at_end(a, not reverse) * h)
    axis = a.ndim + TIME_AXIS
    return jax.lax.associative_scan(combine, (a, u), reverse=reverse, axis=axis)[1]


def _at_end(v: jax.Array, reverse: bool) -> jax.Array:
    """[B, Q, N, E] -> [B, N, E], at the step scanned last."""
    return jax.lax.index_in_dim(v, 0 if reverse else -1, axis=TIME_AXIS, keepdims=False)


def _shift(v: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """Moves v[t-1] to t in scan order, with `first` at the first step."""
    first, length = jnp.expand_dims(first, TIME_AXIS), v.shape[TIME_AXIS]
    if reverse:
        return jnp.concatenate(
            [jax.lax.slice_in_dim(v, 1, length, axis=TIME_AXIS), first], axis=TIME_AXIS
        )
    return jnp.concatenate(
        [first, jax.lax.slice_in_dim(v, 0, length - 1, axis=TIME_AXIS)], axis=TIME_AXIS
    )


# Gradients of single steps.


def _local_gradients(
    now: Chunk,
    A: jax.Array,
    decay: jax.Array,
    u: jax.Array,
    h_before: jax.Array,
    dy: jax.Array,
    dh: jax.Array,
    contract: Callable[[jax.Array, jax.Array, int], jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """Computes the gradients of A [..., N, E] and of (x, dt, B, C), given states and adjoints."""
    h = decay * h_before + u
    log_decay = dh * decay * h_before
    du = contract(dh, now.B, -2)  # gradient of dt * x
    return log_decay * now.dt[..., None, :], (
        du * now.dt,
        du * now.x + jnp.sum(log_decay * _expand_dims(A, log_decay.ndim), axis=-2),
        contract(dh, now.dt * now.x, -1),
        contract(h, dy, -1),
    )


def _contract_by_matmul(h: jax.Array, v: jax.Array, axis: int) -> jax.Array:
    """Contracts [..., N, E] with a vector over N (axis -2) or E (axis -1); fastest on CPU."""
    subscripts = "...ne,...n->...e" if axis == -2 else "...ne,...e->...n"
    return jnp.einsum(subscripts, h, v, precision=jax.lax.Precision.HIGHEST)


def _contract_by_sum(h: jax.Array, v: jax.Array, axis: int) -> jax.Array:
    """The same as a reduction, which accelerators fuse with the producer of `h`."""
    return jnp.sum(h * jnp.expand_dims(v, -3 - axis), axis=axis)
