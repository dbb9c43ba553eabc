"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752, equations 1-2 and algorithm 2).

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]
    y[t] = C[t] . h[t] + D x[t]

with h [E, N] per row, reset to zero where a new segment begins. State, decay and sums are fp32
whatever the inputs are. The backward pass keeps the inputs as they came and the states between
chunks of the length, and solves each chunk again; no [L, E, N] array exists at any time.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from storm_jax.ops.selective_scan import xla
from storm_jax.ops.selective_scan.inputs import Inputs
from storm_jax.ops.spans import segment_starts, varying_alike
from storm_jax.sharding import spec_in_context

CHUNK = {"sequential": 64, "chunked": 256}  # steps; "associative" takes the whole length at once
# The modules of kernels, and the largest state that fits into a core's registers there. They are
# imported where they are used, since a newer JAX may lack what they are written in.
KERNELS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}
MAX_STATE = {"pallas_gpu": 32, "pallas_tpu": 64}
IMPLEMENTATIONS = (*CHUNK, "associative", *KERNELS)


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
      implementation: one of `IMPLEMENTATIONS`, or None for the fastest here (`fastest`). On CPU
        the kernels of the others are interpreted, which is slow.

    Returns:
      y [B, L, E] in the dtype of `x`; h_last [B, E, N] fp32, the state after the last step.

    Raises:
      ValueError: unknown `implementation`, no steps, or shapes that do not fit together.
    """
    if implementation is None:
        implementation = fastest(jax.default_backend(), A.shape[1])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: use one of {IMPLEMENTATIONS} or None")
    batch, length, width = x.shape
    state = A.shape[1]
    _check_shapes(
        x,
        {"dt": dt, "A": A, "B": B, "C": C, "D": D}
        | {"dt_bias": dt_bias, "h0": h0, "segment_ids": segment_ids},
    )
    reset = jnp.zeros((batch, length), jnp.bool_)
    if segment_ids is not None:
        reset = segment_starts(segment_ids, reverse)
    if h0 is None:
        h0 = jnp.zeros((batch, width, state), jnp.float32)
    inputs = Inputs(
        x=x,
        dt=dt,
        A=A.astype(jnp.float32).T,
        B=B,
        C=C,
        D=D.astype(jnp.float32),
        dt_bias=None if dt_bias is None else dt_bias.astype(jnp.float32),
    )
    h0 = h0.astype(jnp.float32).swapaxes(1, 2)

    def run(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        return _scan(*varying_alike(arrays), reverse, implementation)

    on_shards = _on_shards(run, inputs, h0) if implementation in KERNELS else run
    y, h = on_shards(inputs, reset, h0)
    return y, h.swapaxes(1, 2)


def _check_shapes(x: jax.Array, others: dict[str, Any]) -> None:
    (batch, length, width), state = x.shape, others["A"].shape[1]
    if not length:
        raise ValueError(f"x {x.shape} has no steps: the scan needs at least one")
    steps = (batch, length, state)
    expected = {"dt": x.shape, "A": (width, state), "B": steps, "C": steps, "D": (width,)}
    expected |= {"dt_bias": (width,), "h0": (batch, width, state), "segment_ids": (batch, length)}
    for name, v in others.items():
        if v is not None and v.shape != expected[name]:
            raise ValueError(
                f"{name} is {v.shape} where x {x.shape} and A {others['A'].shape} ask for "
                f"{expected[name]}"
            )


def fastest(backend: str, state: int) -> str:
    """The implementation for a backend of JAX and a state size: "sequential" on CPU; on GPU and TPU
    the kernel, or "chunked" where it does not lower (said once in the log) or where the state is
    larger than `MAX_STATE`."""
    if backend == "cpu":
        return "sequential"
    name, platform = ("pallas_tpu", "tpu") if backend == "tpu" else ("pallas_gpu", "cuda")
    return name if state <= MAX_STATE[name] and _lowers(name, platform) else "chunked"


@functools.cache
def _lowers(name: str, platform: str) -> bool:
    """Whether this JAX still lowers a kernel for the platform."""
    shapes = [(1, 64, 128)] * 2 + [(128, 16)] + [(1, 64, 16)] * 2 + [(128,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(*args: jax.Array) -> jax.Array:
        return selective_scan(*args, implementation=name)[0].sum()

    try:
        jax.jit(jax.grad(loss)).trace(*arrays).lower(lowering_platforms=(platform,))
    except Exception as error:  # whatever a JAX that has moved on may raise
        logging.warning(
            "the selective scan's kernel %s does not lower with jax %s (%s): using 'chunked', "
            "which is slower",
            name,
            jax.__version__,
            str(error).split("\n")[0],
        )
        return False
    return True


def _on_shards(run: Callable[..., Any], inputs: Inputs, h0: jax.Array) -> Callable[..., Any]:
    """`run` on each device's rows and channels: XLA cannot split a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return run
    x, h = (spec_in_context(v.shape, "batch", None, "inner") for v in (inputs.x, h0))
    rows, channels = P(x[0]), P(x[2])
    specs: dict[str, Any] = {
        "x": x,
        "dt": x,
        "A": P(None, x[2]),
        "B": rows,
        "C": rows,
        "D": channels,
        "dt_bias": None if inputs.dt_bias is None else channels,
    }
    # Interpreted kernels do not say over which axes they vary, so that is not checked.
    return jax.shard_map(
        run, in_specs=(Inputs(**specs), rows, h), out_specs=(x, h), check_vma=False
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, reverse: bool, implementation: str
) -> tuple[jax.Array, jax.Array]:
    """y [B, L, E] and the last state [B, N, E]."""
    return _scan_forward(inputs, reset, h0, reverse, implementation)[0]


def _scan_forward(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, reverse: bool, implementation: str
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    forward, _ = _passes(implementation, inputs.x.shape[1], reverse)
    y, h, boundaries = forward(inputs, reset, h0)
    return (y, h), (inputs, reset, boundaries)


def _scan_backward(
    reverse: bool, implementation: str, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, np.ndarray, jax.Array]:
    inputs, reset, boundaries = residuals
    _, backward = _passes(implementation, inputs.x.shape[1], reverse)
    grads, dh0 = backward(inputs, reset, boundaries, *cotangents)
    return grads, np.zeros(reset.shape, jax.dtypes.float0), dh0


_scan.defvjp(_scan_forward, _scan_backward)


def _passes(implementation: str, length: int, reverse: bool) -> tuple[Callable, Callable]:
    """The forward and backward pass of an implementation."""
    if implementation in KERNELS:
        kernels = importlib.import_module(f"{__name__}.{KERNELS[implementation]}")
        return _kernel(kernels.forward, reverse), _kernel(kernels.backward, reverse)
    how = xla.How(
        chunk=min(CHUNK.get(implementation, length), length),
        by_steps=implementation == "sequential",
        reverse=reverse,
    )
    return functools.partial(xla.forward, how), functools.partial(xla.backward, how)


def _kernel(run: Callable, reverse: bool) -> Callable:
    """`run` as compiled for the chip the program is lowered for, and interpreted on CPU."""
    return functools.partial(
        jax.lax.platform_dependent,
        cpu=functools.partial(run, reverse=reverse, interpret=True),
        default=functools.partial(run, reverse=reverse, interpret=False),
    )
