"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752, equations 1-2 and algorithm 2).

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]
    y[t] = C[t] . h[t] + D x[t]

The state h is [E, N] per batch row and is reset to zero at the start of each segment. State, decays and
sums are fp32 for any input dtype. The backward pass stores the inputs and the states between chunks of
the sequence, and recomputes each chunk. No [L, E, N] array is ever materialised.
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

from storm_jax.ops import sequence_shards
from storm_jax.ops.guard import agrees
from storm_jax.ops.selective_scan import xla
from storm_jax.ops.selective_scan.inputs import Inputs, step_size
from storm_jax.ops.spans import segment_starts, unify_varying_axes
from storm_jax.sharding import platform, spec_in_context

CHUNK = {"sequential": 64, "chunked": 256}  # steps; "associative" solves the whole length at once
# The module of each kernel, imported on first use: a newer JAX may no longer have what it imports.
KERNELS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}
MAX_D_STATE = {"pallas_gpu": 32, "pallas_tpu": 64}  # the largest state that fits into registers
_TOLERANCE = 1e-4  # of a kernel in float32, relative to the largest value
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
    """Runs the scan over the second axis.

    Letters: B batch, L length, E width, N state size.

    Args:
      x: [B, L, E].
      dt: [B, L, E]. The step size, or with `dt_bias` its pre-activation: the step size is then
        softplus(dt + dt_bias), computed in fp32.
      A: [E, N], negative.
      B, C: [B, L, N].
      D: [E].
      dt_bias: [E].
      reverse: scan from the last step to the first.
      h0: [B, E, N], the initial state; None means zeros.
      segment_ids: int [B, L]; the state is reset to zero where the id changes.
      implementation: one of `IMPLEMENTATIONS`; None selects the fastest one for the platform that
        the program is lowered for. On CPU, the GPU and TPU kernels are interpreted, which is slow.

    Returns:
      y [B, L, E] in the dtype of `x`, and the final state [B, E, N] in fp32.

    Raises:
      ValueError: unknown `implementation`, length 0, or mismatched shapes.
    """
    if implementation is None:
        implementation = fastest(platform(), A.shape[1])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: use one of {IMPLEMENTATIONS} or None")
    batch, length, width = x.shape
    _check_shapes(
        x,
        {"dt": dt, "A": A, "B": B, "C": C, "D": D}
        | {"dt_bias": dt_bias, "h0": h0, "segment_ids": segment_ids},
    )
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
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
    )
    h0 = h0.astype(jnp.float32).swapaxes(1, 2)

    is_sharded = sequence_shards.is_sharded(length)
    scan: Callable[..., Any] = functools.partial(
        _scan_shard if is_sharded else _scan_sequence,
        reverse=reverse,
        implementation=implementation,
    )
    if implementation in KERNELS or is_sharded:
        scan = _shard_over_mesh(scan, inputs, h0, check_vma=implementation not in KERNELS)
    y, h = scan(inputs, segment_ids, h0)
    return y, h.swapaxes(1, 2)


def _check_shapes(x: jax.Array, others: dict[str, Any]) -> None:
    (batch, length, width), d_state = x.shape, others["A"].shape[1]
    if not length:
        raise ValueError(f"x has shape {x.shape}: the scan needs at least one step")
    step_shape = (batch, length, d_state)
    expected = {
        "dt": x.shape,
        "A": (width, d_state),
        "B": step_shape,
        "C": step_shape,
        "D": (width,),
        "dt_bias": (width,),
        "h0": (batch, width, d_state),
        "segment_ids": (batch, length),
    }
    for name, v in others.items():
        if v is not None and v.shape != expected[name]:
            raise ValueError(
                f"{name} has shape {v.shape}, expected {expected[name]} for x {x.shape} and "
                f"A {others['A'].shape}"
            )


def fastest(backend: str, d_state: int) -> str:
    """Returns the fastest implementation for a JAX backend and a state size.

    "sequential" on CPU, and the kernel on GPU and TPU. A kernel is replaced by "chunked" if `d_state`
    exceeds `MAX_D_STATE`, if this version of JAX cannot lower it, or if it does not agree with "chunked" on
    this device. The last two are logged once.
    """
    if backend == "cpu":
        return "sequential"
    name, platform = ("pallas_tpu", "tpu") if backend == "tpu" else ("pallas_gpu", "cuda")
    usable = d_state <= MAX_D_STATE[name] and _lowers(name, platform)
    if usable and backend == jax.default_backend():
        usable = _is_right(name)
    return name if usable else "chunked"


@functools.cache
def _is_right(name: str) -> bool:
    """Whether a kernel agrees with "chunked", values and gradients, on a ragged input with segments."""
    rng = np.random.default_rng(0)
    batch, length, width, d_state = 2, 77, 160, 16
    shapes = [(batch, length, width)] * 2 + [(width, d_state)] + [(batch, length, d_state)] * 2
    x, dt, A, B, C = (rng.standard_normal(shape, np.float32) for shape in shapes)
    D, dt_bias = rng.standard_normal((2, width), np.float32)
    segments = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
    y_weight = rng.standard_normal(x.shape, np.float32)

    def run(implementation: str) -> Any:
        def loss(inputs: tuple) -> tuple[jax.Array, Any]:
            *arrays, bias = inputs
            outputs = selective_scan(
                *arrays,
                dt_bias=bias,
                segment_ids=jnp.asarray(segments),
                implementation=implementation,
            )
            return (outputs[0] * y_weight).sum() + outputs[1].sum(), outputs

        inputs = (x, dt, -np.exp(A), B, C, D, dt_bias)
        return jax.jit(jax.grad(loss, has_aux=True))(inputs)

    return agrees(
        f"the selective scan kernel {name}",
        functools.partial(run, name),
        functools.partial(run, "chunked"),
        tolerance=_TOLERANCE,
        instead="chunked",
    )


@functools.cache
def _lowers(name: str, platform: str) -> bool:
    """Whether this version of JAX can lower a kernel for the platform."""
    shapes = [(1, 64, 128)] * 2 + [(128, 16)] + [(1, 64, 16)] * 2 + [(128,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(*args: jax.Array) -> jax.Array:
        return selective_scan(*args, implementation=name)[0].sum()

    try:
        jax.jit(jax.grad(loss)).trace(*arrays).lower(lowering_platforms=(platform,))
    except Exception as error:  # any error of an incompatible JAX
        logging.warning(
            "cannot lower the selective scan kernel %s with jax %s (%s): falling back to the slower "
            "implementation 'chunked'",
            name,
            jax.__version__,
            str(error).split("\n")[0],
        )
        return False
    return True


def _shard_over_mesh(
    scan: Callable[..., Any], inputs: Inputs, h0: jax.Array, check_vma: bool
) -> Callable[..., Any]:
    """Wraps `scan` to run on the rows, steps and channels of each device.

    Interpreted kernels lose track of varying axes, so these cannot be checked.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return scan
    x = sequence_shards.steps_spec(inputs.x.shape, "inner")
    h = spec_in_context(h0.shape, "batch", None, "inner")
    steps, channels = P(*x[:2]), P(x[2])
    specs: dict[str, Any] = {
        "x": x,
        "dt": x,
        "A": P(None, x[2]),
        "B": steps,
        "C": steps,
        "D": channels,
        "dt_bias": None if inputs.dt_bias is None else channels,
    }
    return jax.shard_map(
        scan, in_specs=(Inputs(**specs), steps, h), out_specs=(x, h), check_vma=check_vma
    )


def _scan_sequence(
    inputs: Inputs, segment_ids: jax.Array, h0: jax.Array, *, reverse: bool, implementation: str
) -> tuple[jax.Array, jax.Array]:
    """Returns y [B, L, E] and the final state [B, N, E]."""
    arrays = (inputs, segment_starts(segment_ids, reverse), h0)
    return _scan(*unify_varying_axes(arrays), reverse, implementation)


def _scan_shard(
    inputs: Inputs, segment_ids: jax.Array, h0: jax.Array, *, reverse: bool, implementation: str
) -> tuple[jax.Array, jax.Array]:
    """The same for a shard of the sequence; h0 and the final state are those of the whole sequence."""
    inputs, segment_ids, h0 = unify_varying_axes((inputs, segment_ids, h0))

    def decay(size: jax.Array) -> jax.Array:  # [..., E] -> [..., N, E]
        return jnp.exp(
            size[..., None, :] * inputs.A.reshape((1,) * (size.ndim - 1) + inputs.A.shape)
        )

    def read(steps: tuple, decays: jax.Array, h: jax.Array) -> jax.Array:
        C = steps[1].astype(jnp.float32)[..., None]  # [B, Q, N, 1]
        return (C * decays * h[:, None]).sum(axis=2)  # [B, Q, E]

    return sequence_shards.scan_shard(
        lambda starts, h0: _scan(inputs, starts, h0, reverse, implementation),
        (inputs.dt, inputs.C),
        segment_ids,
        h0,
        step_size=lambda steps: step_size(steps[0], inputs.dt_bias),
        decay=decay,
        read=read,
        reverse=reverse,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, reverse: bool, implementation: str
) -> tuple[jax.Array, jax.Array]:
    """Returns y [B, L, E] and the final state [B, N, E]."""
    return _scan_forward(inputs, reset, h0, reverse, implementation)[0]


def _scan_forward(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, reverse: bool, implementation: str
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    forward, _ = _passes(implementation, inputs.x.shape[1], reverse)
    y, h, saved_states = forward(inputs, reset, h0)
    return (y, h), (inputs, reset, saved_states)


def _scan_backward(
    reverse: bool, implementation: str, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, np.ndarray, jax.Array]:
    inputs, reset, saved_states = residuals
    _, backward = _passes(implementation, inputs.x.shape[1], reverse)
    grads, dh0 = backward(inputs, reset, saved_states, *cotangents)
    return grads, np.zeros(reset.shape, jax.dtypes.float0), dh0


_scan.defvjp(_scan_forward, _scan_backward)


def _passes(implementation: str, length: int, reverse: bool) -> tuple[Callable, Callable]:
    """Returns the forward and backward pass of an implementation."""
    if implementation in KERNELS:
        module = importlib.import_module(f"{__name__}.{KERNELS[implementation]}")
        return _interpret_on_cpu(module.forward, reverse), _interpret_on_cpu(
            module.backward, reverse
        )
    options = xla.Options(
        chunk=min(CHUNK.get(implementation, length), length),
        sequential=implementation == "sequential",
        reverse=reverse,
    )
    return functools.partial(xla.forward, options), functools.partial(xla.backward, options)


def _interpret_on_cpu(kernel: Callable, reverse: bool) -> Callable:
    """Wraps a kernel to be interpreted if the program is lowered for CPU, and compiled otherwise."""
    return functools.partial(
        jax.lax.platform_dependent,
        cpu=functools.partial(kernel, reverse=reverse, interpret=True),
        default=functools.partial(kernel, reverse=reverse, interpret=False),
    )
