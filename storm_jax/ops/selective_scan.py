"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752, equations 1-2 and algorithm 2).

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]
    y[t] = C[t] . h[t] + D x[t]

with h [E, N] per row, reset to zero where a new segment begins. State, decay and sums are fp32
whatever the inputs are. The sequence is cut into chunks of `CHUNK` steps; only the states between
chunks are stored for the backward pass, which solves each chunk again, so no [L, E, N] array exists
at any time. Two implementations differ in how a chunk is solved:

  "sequential"  one step after another; the fastest on CPU.
  "chunked"     an associative scan over the chunk's steps; for accelerators.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64


def selective_scan(
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
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the scan over the second axis (letters: batch B, length L, width E, state size N).

    Args:
      x, dt: [B, L, E]. With `dt_bias`, softplus(dt + dt_bias) is applied in fp32, else `dt` is
        the step size itself.
      A: [E, N], negative.
      B, C: [B, L, N].
      D: [E].
      dt_bias: [E].
      reverse: scan from the end to the start.
      h0: [B, E, N], the state before the first step; zero when None.
      segment_ids: int [B, L]; the state is reset to zero where the id changes.
      implementation: "sequential", "chunked", or None: sequential on CPU, chunked elsewhere.

    Returns:
      y [B, L, E] in the dtype of `x`; h_last [B, E, N] fp32, the state after the last step.
    """
    if implementation is None:
        implementation = "sequential" if jax.default_backend() == "cpu" else "chunked"
    if implementation not in ("sequential", "chunked"):
        raise ValueError(f"implementation={implementation!r}: use 'sequential', 'chunked' or None")
    batch, length, width = x.shape
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = jax.nn.softplus(dt + dt_bias.astype(jnp.float32)[None, None])
    reset = jnp.zeros((batch, length), jnp.bool_)
    if segment_ids is not None:  # the first step continues from h0, whatever its segment
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        reset = jnp.pad(changed, ((0, 0), (0, 1) if reverse else (1, 0)))
    if h0 is None:
        h0 = jnp.zeros((batch, width, A.shape[1]), jnp.float32)

    chunk = min(CHUNK, length)
    # The scan meets the padding last; with dt = 0 the state passes through it unchanged.
    edges = (-length % chunk, 0) if reverse else (0, -length % chunk)

    # Without an axis of size one, XLA's code for a step on CPU is many times faster.
    rows = (batch,) if batch > 1 else ()

    def chunks(v: jax.Array) -> jax.Array:  # [B, L, ...] -> [L / Q, Q, B, ...]
        v = jnp.pad(v, [(0, 0), edges] + [(0, 0)] * (v.ndim - 2)).swapaxes(0, 1)
        return v.reshape(-1, chunk, *rows, *v.shape[2:])

    y, h = _scan(
        _Inputs(chunks(x), chunks(dt), chunks(B), chunks(C), chunks(reset)),
        A.astype(jnp.float32).T,
        h0.astype(jnp.float32).swapaxes(1, 2).reshape(*rows, A.shape[1], width),
        reverse,
        implementation,
    )
    y = y.reshape(-1, batch, width).swapaxes(0, 1)[:, edges[0] : edges[0] + length]
    y += D.astype(jnp.float32)[None, None] * x
    return y.astype(x.dtype), h.reshape(batch, A.shape[1], width).swapaxes(1, 2)


class _Inputs(NamedTuple):
    """Time-major inputs, in chunks [L / Q, Q, B, ...], one chunk [Q, B, ...] or one step; a single
    row has no axis B."""

    x: jax.Array  # [..., B, E]
    dt: jax.Array  # [..., B, E]
    B: jax.Array  # [..., B, N]
    C: jax.Array  # [..., B, N]
    reset: jax.Array  # [..., B]

    def fp32(self) -> _Inputs:
        x, dt, B, C = (v.astype(jnp.float32) for v in self[:4])
        return _Inputs(x, dt, B, C, self.reset)

    def flip(self, reverse: bool) -> _Inputs:
        return _Inputs(*(_flip(v, reverse) for v in self))

    def recurrence(self, A: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The decay a and the input u of h[t] = a[t] h[t-1] + u[t]; both [..., B, N, E]."""
        decay = jnp.exp(self.dt[..., None, :] * _leading(A, self.dt.ndim + 1))
        decay = jnp.where(self.reset[..., None, None], 0.0, decay)
        return decay, (self.dt * self.x)[..., None, :] * self.B[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(
    inputs: _Inputs, A: jax.Array, h: jax.Array, reverse: bool, implementation: str
) -> tuple[jax.Array, jax.Array]:
    """y without the D term [L / Q, Q, B, E] fp32 and the last state [B, N, E]; A is [N, E]."""
    return _scan_forward(inputs, A, h, reverse, implementation)[0]


def _scan_forward(
    inputs: _Inputs, A: jax.Array, h: jax.Array, reverse: bool, implementation: str
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    solve = _outputs_by_steps if implementation == "sequential" else _outputs_by_associativity

    def body(h: jax.Array, chunk: _Inputs) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h_next, y = solve(chunk.fp32().flip(reverse), A, h)
        return h_next, (_flip(y, reverse), h)

    h_last, (y, boundary) = jax.lax.scan(body, h, inputs, reverse=reverse)
    return (y, h_last), (inputs, A, boundary)


def _scan_backward(
    reverse: bool, implementation: str, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[_Inputs, jax.Array, jax.Array]:
    inputs, A, boundary = residuals
    dy, dh_last = cotangents
    solve = _gradients_by_steps if implementation == "sequential" else _gradients_by_associativity

    def body(carry: tuple[jax.Array, jax.Array], args: tuple) -> tuple[tuple, tuple]:
        dh, dA = carry
        chunk, h, dy = args
        dh, dA_chunk, grads = solve(chunk.fp32().flip(reverse), A, h, _flip(dy, reverse), dh)
        typed = [_flip(g, reverse).astype(v.dtype) for g, v in zip(grads, chunk[:4], strict=True)]
        return (dh, dA + dA_chunk), tuple(typed)

    (dh, dA), (dx, ddt, dB, dC) = jax.lax.scan(
        body, (dh_last, jnp.zeros_like(A)), (inputs, boundary, dy), reverse=not reverse
    )
    no_gradient = jnp.zeros(inputs.reset.shape, jax.dtypes.float0)
    return _Inputs(dx, ddt, dB, dC, no_gradient), dA, dh


_scan.defvjp(_scan_forward, _scan_backward)


def _leading(x: jax.Array, ndim: int) -> jax.Array:
    """`x` with axes of size 1 in front."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _over_rows(dA: jax.Array) -> jax.Array:
    """Sums all axes but the last two, [N, E]."""
    return dA.sum(axis=tuple(range(dA.ndim - 2)))


def _flip(x: jax.Array, reverse: bool) -> jax.Array:
    return x[::-1] if reverse else x


# One chunk, step by step.


def _outputs_by_steps(chunk: _Inputs, A: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(h: jax.Array, now: _Inputs) -> tuple[jax.Array, jax.Array]:
        decay, u = now.recurrence(A)
        h = decay * h + u
        return h, jnp.sum(h * now.C[..., None], axis=-2)

    return jax.lax.scan(step, h, chunk)


def _gradients_by_steps(
    chunk: _Inputs, A: jax.Array, h: jax.Array, dy: jax.Array, dh: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    def replay(h: jax.Array, now: _Inputs) -> tuple[jax.Array, jax.Array]:
        decay, u = now.recurrence(A)
        return decay * h + u, h

    _, h_before = jax.lax.scan(replay, h, chunk)  # [Q, B, N, E]

    def step(carry: tuple[jax.Array, jax.Array], args: tuple) -> tuple[tuple, tuple]:
        dh, dA = carry
        now, h_before, dy = args
        decay, u = now.recurrence(A)
        dh = dh + dy[..., None, :] * now.C[..., None]
        dA_now, grads = _local_gradients(now, A, decay, u, h_before, dy, dh)
        return (decay * dh, dA + _over_rows(dA_now)), grads

    carry = (dh, jnp.zeros_like(A))
    (dh, dA), grads = jax.lax.scan(step, carry, (chunk, h_before, dy), reverse=True)
    return dh, dA, grads


# One chunk, all steps at once.


def _outputs_by_associativity(
    chunk: _Inputs, A: jax.Array, h: jax.Array
) -> tuple[jax.Array, jax.Array]:
    decay, u = chunk.recurrence(A)
    h = _linear_recurrence(decay, u.at[0].add(decay[0] * h))
    return h[-1], jnp.sum(h * chunk.C[..., None], axis=-2)


def _gradients_by_associativity(
    chunk: _Inputs, A: jax.Array, h: jax.Array, dy: jax.Array, dh: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    decay, u = chunk.recurrence(A)
    states = _linear_recurrence(decay, u.at[0].add(decay[0] * h))
    h_before = jnp.concatenate([h[None], states[:-1]])
    # The adjoint obeys dh[t] = decay[t+1] dh[t+1] + C[t] dy[t].
    source = (dy[..., None, :] * chunk.C[..., None]).at[-1].add(dh)
    after = jnp.concatenate([decay[1:], jnp.zeros_like(decay[:1])])
    dh = _linear_recurrence(after, source, reverse=True)
    dA, grads = _local_gradients(chunk, A, decay, u, h_before, dy, dh)
    return decay[0] * dh[0], _over_rows(dA), grads


def _linear_recurrence(a: jax.Array, u: jax.Array, reverse: bool = False) -> jax.Array:
    """All h[t] = a[t] h[t-1] + u[t] along the first axis, from zero."""

    def combine(left: tuple, right: tuple) -> tuple:
        return right[0] * left[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, u), reverse=reverse)[1]


def _local_gradients(
    now: _Inputs,
    A: jax.Array,
    decay: jax.Array,
    u: jax.Array,
    h_before: jax.Array,
    dy: jax.Array,
    dh: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """Gradients of A [..., B, N, E] and of x, dt, B, C at steps whose states are known."""
    h = decay * h_before + u
    log_decay = dh * decay * h_before
    du = jnp.sum(dh * now.B[..., None], axis=-2)  # of dt * x
    return log_decay * now.dt[..., None, :], (
        du * now.dt,
        du * now.x + jnp.sum(log_decay * _leading(A, log_decay.ndim), axis=-2),
        jnp.sum(dh * (now.dt * now.x)[..., None, :], axis=-1),
        jnp.sum(h * dy[..., None, :], axis=-1),
    )
