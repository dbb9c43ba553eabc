"""Protects the selective scan: values and gradients of both implementations, whatever the length,
direction, segments and initial state, and its promise never to hold a state per step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from storm_jax.ops.selective_scan import CHUNK, selective_scan

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
BFLOAT16 = {"rtol": 2**-8, "atol": 1e-5}  # one rounding of the output
BATCH, WIDTH, STATE = 2, 3, 4
ALL = ("dt_bias", "h0", "segment_ids")
IMPLEMENTATIONS = ("sequential", "chunked")
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 150)

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
scan = jax.jit(selective_scan, static_argnames=("reverse", "implementation"))


def make_inputs(rng, length, options=(), reverse=False):
    """Float32 arrays by argument name; decays are slow enough for states to cross chunks."""
    bias = "dt_bias" in options
    step = (BATCH, length, WIDTH)
    inputs = {
        "x": rng.standard_normal(step),
        "dt": rng.standard_normal(step) if bias else rng.uniform(0.01, 0.2, step),
        "A": -rng.uniform(0.05, 0.5, (WIDTH, STATE)),
        "B": rng.standard_normal((BATCH, length, STATE)),
        "C": rng.standard_normal((BATCH, length, STATE)),
        "D": rng.standard_normal(WIDTH),
        "dt_bias": rng.uniform(-4, -2, WIDTH),
        "h0": rng.standard_normal((BATCH, WIDTH, STATE)),
    }
    inputs = {
        name: value.astype(np.float32)
        for name, value in inputs.items()
        if name not in ALL or name in options
    }
    if "segment_ids" in options:
        inputs["segment_ids"] = make_segments(length, reverse)
    return inputs


def make_segments(length, reverse):
    """Boundaries, counted from where the scan starts, inside chunks, on their edges and one step
    apart; an id comes back."""
    t = np.arange(length)
    chunk_edges = 1 + (t >= CHUNK) + (t >= CHUNK + 1) + (t >= 2 * CHUNK)
    inside = np.where((t >= 10) & (t < 100), 2, 1)
    ids = np.stack([chunk_edges, inside]).astype(np.int32)
    return ids[:, ::-1] if reverse else ids


def scan_order(length, reverse):
    return range(length - 1, -1, -1) if reverse else range(length)


def reference(x, dt, A, B, C, D, dt_bias=None, h0=None, segment_ids=None, reverse=False):
    """The recurrence of the module's docstring in float64, one step and row at a time."""
    x, dt, A, B, C, D = (np.asarray(v, np.float64) for v in (x, dt, A, B, C, D))
    if dt_bias is not None:
        dt = np.log1p(np.exp(dt + np.asarray(dt_bias, np.float64)))
    y, last = np.zeros(x.shape), np.zeros((len(x), *A.shape))
    for b in range(len(x)):
        h = np.zeros(A.shape) if h0 is None else np.asarray(h0[b], np.float64)
        before = None
        for t in scan_order(x.shape[1], reverse):
            if segment_ids is not None:
                if before is not None and segment_ids[b, t] != before:
                    h = np.zeros(A.shape)
                before = segment_ids[b, t]
            h = np.exp(dt[b, t][:, None] * A) * h + np.outer(dt[b, t] * x[b, t], B[b, t])
            y[b, t] = h @ C[b, t] + D * x[b, t]
        last[b] = h
    return y, last


def reference_gradients(inputs, dy, dh, reverse):
    """Float64 gradients of sum(y * dy) + sum(h_last * dh), by torch through the same recurrence."""
    leaves = {
        name: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
        for name, value in inputs.items()
        if name != "segment_ids"
    }
    x, dt, A, B, C, D = (leaves[name] for name in ("x", "dt", "A", "B", "C", "D"))
    if "dt_bias" in leaves:
        dt = torch.nn.functional.softplus(dt + leaves["dt_bias"])
    h = leaves.get("h0", torch.zeros(len(x), *A.shape, dtype=torch.float64))
    ids = inputs.get("segment_ids", np.zeros(x.shape[:2]))
    total, before = 0.0, None
    for t in scan_order(x.shape[1], reverse):
        if before is not None:
            h = h * torch.tensor(ids[:, t] == ids[:, before])[:, None, None]
        before = t
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y = (h * C[:, t, None]).sum(-1) + D * x[:, t]
        total = total + (y * torch.tensor(dy[:, t], dtype=torch.float64)).sum()
    total = total + (h * torch.tensor(dh, dtype=torch.float64)).sum()
    total.backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@functools.partial(jax.jit, static_argnames=("reverse", "implementation"))
def outputs_and_gradients(inputs, dy, dh, *, reverse, implementation):
    """y and h_last, and the gradients of sum(y * dy) + sum(h_last * dh)."""
    segments = {name: inputs[name] for name in inputs if name == "segment_ids"}

    def loss(floats):
        y, h = selective_scan(**floats, **segments, reverse=reverse, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) * dy) + jnp.sum(h * dh), (y, h)

    floats = {name: inputs[name] for name in inputs if name not in segments}
    grads, outputs = jax.grad(loss, has_aux=True)(floats)
    return outputs, grads


def make_cotangents(rng, length):
    dy = rng.standard_normal((BATCH, length, WIDTH)).astype(np.float32)
    dh = rng.standard_normal((BATCH, WIDTH, STATE)).astype(np.float32)
    return dy, dh


def assert_outputs(outputs, inputs, reverse):
    for got, expected in zip(outputs, reference(**inputs, reverse=reverse), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, **TOLERANCE)


@each_implementation
@each_direction
@pytest.mark.parametrize("length", LENGTHS)
def test_values_equal_the_recurrence(rng, length, reverse, implementation):
    inputs = make_inputs(rng, length, ALL, reverse)
    outputs = scan(**inputs, reverse=reverse, implementation=implementation)
    assert_outputs(outputs, inputs, reverse)


GRADIENT_CASES = {
    "forward": (150, ALL, False),
    "reverse": (150, ALL, True),
    "forward, nothing optional": (150, (), False),
    "reverse, no segments": (CHUNK + 1, ("dt_bias", "h0"), True),
}


@each_implementation
@pytest.mark.parametrize(
    ("length", "options", "reverse"), GRADIENT_CASES.values(), ids=GRADIENT_CASES
)
def test_gradients_equal_the_recurrence(rng, length, options, reverse, implementation):
    inputs = make_inputs(rng, length, options, reverse)
    cotangents = make_cotangents(rng, length)
    outputs, got = outputs_and_gradients(
        inputs, *cotangents, reverse=reverse, implementation=implementation
    )
    assert_outputs(outputs, inputs, reverse)
    expected = reference_gradients(inputs, *cotangents, reverse)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, np.abs(value).max())  # sums over many steps cancel
        np.testing.assert_allclose(
            got[name] / scale, value / scale, **TOLERANCE, err_msg=f"gradient of {name}"
        )


@each_implementation
@each_direction
def test_a_single_row_gives_what_it_gives_in_a_batch(rng, reverse, implementation):
    """One row is solved without a batch axis."""
    inputs = make_inputs(rng, 150, ALL, reverse)
    cotangents = make_cotangents(rng, 150)
    run = functools.partial(outputs_and_gradients, reverse=reverse, implementation=implementation)
    shared = ("A", "D", "dt_bias")
    rows, summed = [], dict.fromkeys(shared, 0.0)
    for b in range(BATCH):
        one = {name: v if name in shared else v[b : b + 1] for name, v in inputs.items()}
        outputs, grads = run(one, *(v[b : b + 1] for v in cotangents))
        rows.append((outputs, {name: g for name, g in grads.items() if name not in shared}))
        summed = {name: summed[name] + grads[name] for name in shared}
    together = jax.tree.map(lambda *v: np.concatenate(v), *rows)
    outputs, grads = run(inputs, *cotangents)
    for got, expected in zip(together[0], outputs, strict=True):
        np.testing.assert_allclose(got, expected, **TOLERANCE)
    for name, value in (together[1] | summed).items():
        scale = max(1.0, np.abs(grads[name]).max())
        np.testing.assert_allclose(value / scale, grads[name] / scale, **TOLERANCE, err_msg=name)


@each_implementation
@each_direction
def test_segments_equal_running_each_apart(rng, reverse, implementation):
    size, count = CHUNK + 6, 2
    inputs = make_inputs(rng, count * size, ("dt_bias",))
    ids = np.repeat(np.arange(1, count + 1, dtype=np.int32), size)
    run = functools.partial(scan, reverse=reverse, implementation=implementation)
    y, h = run(**inputs, segment_ids=np.stack([ids] * BATCH))
    apart = []
    for segment in range(1, count + 1):
        steps = {name: inputs[name][:, ids == segment] for name in ("x", "dt", "B", "C")}
        apart.append(run(**(inputs | steps)))
    np.testing.assert_allclose(y, np.concatenate([one[0] for one in apart], axis=1), **TOLERANCE)
    np.testing.assert_allclose(h, apart[0 if reverse else -1][1], **TOLERANCE)


def round_to_bfloat16(inputs):
    return {
        name: jnp.asarray(value, jnp.bfloat16) if name in ("x", "dt", "B", "C") else value
        for name, value in inputs.items()
    }


@each_implementation
def test_bfloat16_rounds_only_inputs_outputs_and_gradients(rng, implementation):
    inputs = round_to_bfloat16(make_inputs(rng, 150, ALL))
    dy, dh = make_cotangents(rng, 150)
    dy = np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float32)
    (y, h), got = outputs_and_gradients(
        inputs, dy, dh, reverse=False, implementation=implementation
    )
    expected_y, expected_h = reference(**inputs)
    assert y.dtype == jnp.bfloat16
    assert h.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y, np.float64), expected_y, **BFLOAT16)
    np.testing.assert_allclose(h, expected_h, **TOLERANCE)
    for name, value in reference_gradients(inputs, dy, dh, reverse=False).items():
        assert got[name].dtype == inputs[name].dtype, name
        rounded = inputs[name].dtype == jnp.bfloat16
        error = np.abs(np.asarray(got[name], np.float64) - value).max()
        assert error <= (2**-7 if rounded else 1e-4) * np.abs(value).max(), name


def largest_array(jaxpr):
    """Elements of the largest value anywhere in a jaxpr."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        for inner in jaxprs_in_params(equation.params):
            sizes.append(largest_array(inner))
    return max(sizes)


def state_of_every_step(x, dt, A, B, C, D):
    def step(h, now):
        x, dt, B, C = now
        h = jnp.exp(dt[..., None] * A[None]) * h + (dt * x)[..., None] * B[:, None]
        return h, jnp.sum(h * C[:, None], axis=-1)

    h = jnp.zeros((x.shape[0], *A.shape))
    h, y = jax.lax.scan(step, h, tuple(v.swapaxes(0, 1) for v in (x, dt, B, C)))
    return y.swapaxes(0, 1) + D[None, None] * x, h


@pytest.mark.parametrize(
    ("function", "stored"),
    [
        (functools.partial(selective_scan, implementation="sequential"), False),
        (functools.partial(selective_scan, implementation="chunked"), False),
        (state_of_every_step, True),  # what the measure has to find
    ],
    ids=[*IMPLEMENTATIONS, "plain scan"],
)
def test_gradient_never_holds_the_state_of_every_step(function, stored):
    length, width, state = 4096, 64, 16
    shapes = [(1, length, width)] * 2 + [(width, state)] + [(1, length, state)] * 2 + [(width,)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(*args):
        y, h = function(*args)
        return jnp.sum(y) + jnp.sum(h)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(6))))(*arguments)
    assert (largest_array(jaxpr.jaxpr) >= length * width * state) == stored


def test_unknown_implementation_is_refused(rng):
    with pytest.raises(ValueError, match="parallel"):
        selective_scan(**make_inputs(rng, 2), implementation="parallel")
