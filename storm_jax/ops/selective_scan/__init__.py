"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752, equations 1-2 and algorithm 2).

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]
    y[t] = C[t] . h[t] + D x[t]

with h [E, N] per row, reset to zero where a new segment begins. State, decay and sums are fp32
whatever the inputs are. The backward pass keeps the inputs as they came and the states between
chunks of the length, and solves each chunk again; no [L, E, N] array exists at any time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from storm_jax.ops.selective_scan import xla
from storm_jax.ops.selective_scan.inputs import Inputs

CHUNK = {"sequential": 64, "chunked": 256}  # steps; "associative" takes the whole length at once
IMPLEMENTATIONS = (*CHUNK, "associative")


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
      implementation: one of `IMPLEMENTATIONS`, or None: "sequential" on CPU, "chunked" elsewhere.

    Returns:
      y [B, L, E] in the dtype of `x`; h_last [B, E, N] fp32, the state after the last step.
    """
    if implementation is None:
        implementation = "sequential" if jax.default_backend() == "cpu" else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: use one of {IMPLEMENTATIONS} or None")
    batch, length, width = x.shape
    reset = jnp.zeros((batch, length), jnp.bool_)
    if segment_ids is not None:  # the first step continues from h0, whatever its segment
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        reset = jnp.pad(changed, ((0, 0), (0, 1) if reverse else (1, 0)))
    if h0 is None:
        h0 = jnp.zeros((batch, width, A.shape[1]), jnp.float32)
    inputs = Inputs(
        x=x,
        dt=dt,
        A=A.astype(jnp.float32).T,
        B=B,
        C=C,
        D=D.astype(jnp.float32),
        dt_bias=None if dt_bias is None else dt_bias.astype(jnp.float32),
        reset=reset,
    )
    inputs, h0 = _varying_alike((inputs, h0.astype(jnp.float32).swapaxes(1, 2)))
    y, h = _scan(inputs, h0, reverse, implementation)
    return y, h.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(
    inputs: Inputs, h0: jax.Array, reverse: bool, implementation: str
) -> tuple[jax.Array, jax.Array]:
    """y [B, L, E] and the last state [B, N, E]."""
    return _scan_forward(inputs, h0, reverse, implementation)[0]


def _scan_forward(
    inputs: Inputs, h0: jax.Array, reverse: bool, implementation: str
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    options = _xla_options(inputs, implementation)
    y, h, boundaries = xla.forward(inputs, h0, reverse=reverse, **options)
    return (y, h), (inputs, boundaries)


def _scan_backward(
    reverse: bool, implementation: str, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, jax.Array]:
    inputs, boundaries = residuals
    options = _xla_options(inputs, implementation)
    grads, dh0 = xla.backward(inputs, boundaries, *cotangents, reverse=reverse, **options)
    return grads._replace(reset=jnp.zeros(inputs.reset.shape, jax.dtypes.float0)), dh0


_scan.defvjp(_scan_forward, _scan_backward)


def _xla_options(inputs: Inputs, implementation: str) -> dict[str, Any]:
    length = inputs.x.shape[1]
    chunk = min(CHUNK.get(implementation, length), length)
    return {"chunk": chunk, "by_steps": implementation == "sequential"}


def _varying_alike(tree: Any) -> Any:
    """Inside a `shard_map`, marks every array as varying over each mesh axis that any of them varies
    over: the loops carry them together, and the gradient of one that came whole is then summed."""
    axes = {axis for v in jax.tree.leaves(tree) for axis in jax.typeof(v).mat.varying}

    def cast(v: jax.Array) -> jax.Array:
        return jax.lax.pcast(v, tuple(sorted(axes - jax.typeof(v).mat.varying)), to="varying")

    return jax.tree.map(cast, tree)
