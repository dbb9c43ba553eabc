"""The selective scan in plain JAX, chunk by chunk.

A loop runs over chunks of the length and carries the state; it reads a chunk where it lies and
writes its results where they belong, so that no input is padded, transposed or cast as a whole.
Within a chunk the recurrence is solved in one of two ways:

  by steps          one after another: the fastest on CPU.
  by associativity  all at once, in log2(Q) rounds: for accelerators, which need wide work.

Letters: B batch, E width, N state size; Q steps of a chunk. A single row has no axis B: with it XLA's
code for a step on CPU is many times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.ops.selective_scan.inputs import Inputs, step_size, step_size_slope
from storm_jax.ops.spans import Span, over_spans


class Chunk(NamedTuple):
    """A chunk of the inputs, [B, Q, ...], or one step of it, [B, ...]; fp32."""

    x: jax.Array  # [..., E]
    dt: jax.Array  # [..., E], the step size itself
    B: jax.Array  # [..., N]
    C: jax.Array  # [..., N]
    reset: jax.Array  # [...]

    def recurrence(self, A: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The decay a and the input u of h[t] = a[t] h[t-1] + u[t]; both [..., N, E]."""
        decay = jnp.exp(self.dt[..., None, :] * _leading(A, self.dt.ndim + 1))
        decay = jnp.where(self.reset[..., None, None], 0.0, decay)
        return decay, (self.dt * self.x)[..., None, :] * self.B[..., None]


class How(NamedTuple):
    chunk: int  # steps
    by_steps: bool  # or by associativity
    reverse: bool  # from the end to the start


def forward(
    how: How, inputs: Inputs, reset: jax.Array, h0: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solves the scan.

    Args:
      how: how it is solved.
      inputs: of length L.
      reset: bool [B, L], the state is zero before this step.
      h0: [B, N, E] fp32.

    Returns:
      y [B, L, E] in the dtype of x; the last state [B, N, E]; the state with which each chunk
      began, [ceil(L / chunk), B, N, E].
    """
    solve = _outputs_by_steps if how.by_steps else _outputs_by_associativity

    def body(carry: tuple, span: Span) -> tuple:
        h, y, boundaries = carry
        boundaries = jax.lax.dynamic_update_index_in_dim(boundaries, h, span.number, 0)
        steps = _read_chunk(inputs, reset, span)
        h, out = solve(steps, inputs.A, h, how.reverse)
        out += _leading(inputs.D, out.ndim) * steps.x
        return h, span.write(y, out), boundaries

    h = _without_single_row(h0)
    count = -(-inputs.x.shape[1] // how.chunk)
    y = jnp.zeros_like(inputs.x)
    boundaries = jnp.zeros_like(h, shape=(count, *h.shape))
    carry = (h, y, boundaries)
    h, y, boundaries = over_spans(body, carry, inputs.x.shape[1], how.chunk, how.reverse)
    return y, h.reshape(h0.shape), boundaries


def backward(
    how: How,
    inputs: Inputs,
    reset: jax.Array,
    boundaries: jax.Array,
    dy: jax.Array,
    dh_last: jax.Array,
) -> tuple[Inputs, jax.Array]:
    """Gradients of the inputs and of h0, given those of the outputs; each chunk's states are solved
    again from its boundary state."""
    solve = _gradients_by_steps if how.by_steps else _gradients_by_associativity

    def body(carry: tuple, span: Span) -> tuple:
        dh, grads = carry
        steps = _read_chunk(inputs, reset, span)
        dy_chunk = _read(span, dy).astype(jnp.float32)
        h = jax.lax.dynamic_index_in_dim(boundaries, span.number, 0, keepdims=False)
        dh, dA, (dx, ddt, dB, dC) = solve(steps, inputs.A, h, dy_chunk, dh, how.reverse)
        dx += _leading(inputs.D, dx.ndim) * dy_chunk
        ddt *= step_size_slope(steps.dt, inputs.dt_bias)
        dbias = None if inputs.dt_bias is None else grads.dt_bias + _sum_but(ddt, 1)
        dx, ddt, dB, dC = span.write((grads.x, grads.dt, grads.B, grads.C), (dx, ddt, dB, dC))
        grads = Inputs(
            x=dx,
            dt=ddt,
            A=grads.A + dA,
            B=dB,
            C=dC,
            D=grads.D + _sum_but(dy_chunk * steps.x, 1),
            dt_bias=dbias,
        )
        return dh, grads

    grads = jax.tree.map(jnp.zeros_like, inputs)
    carry = (_without_single_row(dh_last), grads)
    dh, grads = over_spans(body, carry, inputs.x.shape[1], how.chunk, not how.reverse)
    return grads, dh.reshape(dh_last.shape)


def _read_chunk(inputs: Inputs, reset: jax.Array, span: Span) -> Chunk:
    x, B, C = (_read(span, v).astype(jnp.float32) for v in (inputs.x, inputs.B, inputs.C))
    return Chunk(x, step_size(_read(span, inputs.dt), inputs.dt_bias), B, C, _read(span, reset))


def _read(span: Span, v: jax.Array) -> jax.Array:
    """[B, L, ...] -> [B, Q, ...]."""
    return _without_single_row(span.read(v))


def _without_single_row(v: jax.Array) -> jax.Array:
    return v[0] if v.shape[0] == 1 else v


def _leading(x: jax.Array, ndim: int) -> jax.Array:
    """`x` with axes of size 1 in front."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _sum_but(x: jax.Array, kept: int) -> jax.Array:
    """Sums all axes but the last `kept`."""
    return x.sum(axis=tuple(range(x.ndim - kept)))


# One chunk, step by step.


def _outputs_by_steps(
    chunk: Chunk, A: jax.Array, h: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    def step(h: jax.Array, now: Chunk) -> tuple[jax.Array, jax.Array]:
        decay, u = now.recurrence(A)
        h = decay * h + u
        return h, _contract_by_matmul(h, now.C, -2)

    h, y = jax.lax.scan(step, h, _swap_time(chunk, h), reverse=reverse)
    return h, _swap_time(y, h)


def _gradients_by_steps(
    chunk: Chunk, A: jax.Array, h: jax.Array, dy: jax.Array, dh: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    def replay(h: jax.Array, now: Chunk) -> tuple[jax.Array, jax.Array]:
        decay, u = now.recurrence(A)
        return decay * h + u, h

    chunk, dy = _swap_time((chunk, dy), h)
    _, h_before = jax.lax.scan(replay, h, chunk, reverse=reverse)  # [Q, B, N, E]

    def step(carry: tuple[jax.Array, jax.Array], args: tuple) -> tuple[tuple, tuple]:
        dh, dA = carry
        now, h_before, dy = args
        decay, u = now.recurrence(A)
        dh = dh + dy[..., None, :] * now.C[..., None]
        dA_now, grads = _local_gradients(now, A, decay, u, h_before, dy, dh, _contract_by_matmul)
        return (decay * dh, dA + _sum_but(dA_now, 2)), grads

    carry = (dh, jnp.zeros_like(A))
    (dh, dA), grads = jax.lax.scan(step, carry, (chunk, h_before, dy), reverse=not reverse)
    return dh, dA, _swap_time(grads, h)


def _swap_time(tree: Any, h: jax.Array) -> Any:
    """[B, Q, ...] <-> [Q, B, ...]."""
    return tree if h.ndim == 2 else jax.tree.map(lambda v: v.swapaxes(0, 1), tree)


# One chunk, all steps at once. Arrays with a state are [B, Q, N, E].

TIME = -3


def _outputs_by_associativity(
    chunk: Chunk, A: jax.Array, h: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    states = _linear_recurrence(*chunk.recurrence(A), h, reverse)
    return _at_end(states, reverse), _contract_by_sum(states, chunk.C, -2)


def _gradients_by_associativity(
    chunk: Chunk, A: jax.Array, h: jax.Array, dy: jax.Array, dh: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    decay, u = chunk.recurrence(A)
    h_before = _shift(_linear_recurrence(decay, u, h, reverse), h, reverse)
    # The adjoint obeys dh[t] = decay[t+1] dh[t+1] + C[t] dy[t]; dh is that of the state after the
    # last step, as though one more step of decay one followed.
    after = _shift(decay, jnp.ones_like(h), not reverse)
    source = dy[..., None, :] * chunk.C[..., None]
    dh = _linear_recurrence(after, source, dh, not reverse)
    dA, grads = _local_gradients(chunk, A, decay, u, h_before, dy, dh, _contract_by_sum)
    return _at_end(decay * dh, not reverse), _sum_but(dA, 2), grads


def _linear_recurrence(a: jax.Array, u: jax.Array, h: jax.Array, reverse: bool) -> jax.Array:
    """All h[t] = a[t] h[t-1] + u[t], from `h`."""

    def combine(left: tuple, right: tuple) -> tuple:
        return right[0] * left[0], right[0] * left[1] + right[1]

    first = a.shape[TIME] - 1 if reverse else 0
    u = u.at[..., first, :, :].add(_at_end(a, not reverse) * h)
    axis = a.ndim + TIME
    return jax.lax.associative_scan(combine, (a, u), reverse=reverse, axis=axis)[1]


def _at_end(v: jax.Array, reverse: bool) -> jax.Array:
    """[B, Q, N, E] -> [B, N, E] where a scan ends."""
    return jax.lax.index_in_dim(v, 0 if reverse else -1, axis=TIME, keepdims=False)


def _shift(v: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """v[t-1] at t, with `first` where the scan starts."""
    first, length = jnp.expand_dims(first, TIME), v.shape[TIME]
    if reverse:
        return jnp.concatenate([jax.lax.slice_in_dim(v, 1, length, axis=TIME), first], axis=TIME)
    return jnp.concatenate([first, jax.lax.slice_in_dim(v, 0, length - 1, axis=TIME)], axis=TIME)


# Gradients of a step.


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
    """Gradients of A [..., N, E] and of x, dt, B, C at steps whose states are known."""
    h = decay * h_before + u
    log_decay = dh * decay * h_before
    du = contract(dh, now.B, -2)  # of dt * x
    return log_decay * now.dt[..., None, :], (
        du * now.dt,
        du * now.x + jnp.sum(log_decay * _leading(A, log_decay.ndim), axis=-2),
        contract(dh, now.dt * now.x, -1),
        contract(h, dy, -1),
    )


def _contract_by_matmul(h: jax.Array, v: jax.Array, axis: int) -> jax.Array:
    """[..., N, E] with a vector over N (axis -2) or E (axis -1): on CPU the fast way."""
    subscripts = "...ne,...n->...e" if axis == -2 else "...ne,...e->...n"
    return jnp.einsum(subscripts, h, v, precision=jax.lax.Precision.HIGHEST)


def _contract_by_sum(h: jax.Array, v: jax.Array, axis: int) -> jax.Array:
    """The same as a reduction, which accelerators fuse with what makes `h`."""
    return jnp.sum(h * jnp.expand_dims(v, -3 - axis), axis=axis)
