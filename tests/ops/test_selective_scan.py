"""The selective scan: values and gradients of every implementation, for any length, direction, segments
and initial state, under vmap and shard_map; and memory that grows with the inputs, not the states."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scan_checks import TOLERANCE, assert_close

from storm_jax.config import MeshConfig
from storm_jax.ops import selective_scan as selective_scan_module
from storm_jax.ops.selective_scan import (
    CHUNK,
    IMPLEMENTATIONS,
    KERNELS,
    fastest,
    selective_scan,
)
from storm_jax.sharding import make_mesh

BFLOAT16 = {"rtol": 2**-8, "atol": 1e-5}  # one rounding of the output
BATCH, WIDTH, STATE = 2, 3, 4
ALL = ("dt_bias", "h0", "segment_ids")
DEFAULT_CHUNK = dict(CHUNK)
SMALL_CHUNK = {"sequential": 8, "chunked": 16}  # short sequences, which compile and run faster

XLA = [name for name in IMPLEMENTATIONS if name not in KERNELS]
# Interpreted kernels compile slowly.
kernels_slowly = pytest.mark.parametrize(
    "implementation", [*XLA, *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS)]
)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
scan = jax.jit(selective_scan, static_argnames=("reverse", "implementation"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for name, steps in SMALL_CHUNK.items():
        monkeypatch.setitem(CHUNK, name, steps)


@pytest.fixture
def default_chunks(monkeypatch, small_chunks):
    for name, steps in DEFAULT_CHUNK.items():
        monkeypatch.setitem(CHUNK, name, steps)


def make_inputs(rng, length, options=(), reverse=False):
    """Returns fp32 arrays by argument name; decays are slow enough for states to cross chunks."""
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


def widen(inputs, times):
    """Repeats every channel."""
    axis = {"x": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0, "h0": 1}
    return {
        name: np.repeat(v, times, axis[name]) if name in axis else v for name, v in inputs.items()
    }


def make_segments(length, reverse):
    """Returns ids that change inside chunks, at their edges, and at adjacent steps; an id recurs."""
    t = np.arange(length)
    chunks = (*SMALL_CHUNK.values(), *DEFAULT_CHUNK.values())  # kernels have chunks of 64 and 128
    chunk_edges = 1 + sum((t >= q) + (t >= q + 1) + (t >= 2 * q) for q in chunks)
    inside = np.where((t >= 5) & (t < 100), 2, 1)
    ids = np.stack([chunk_edges, inside]).astype(np.int32)
    return ids[:, ::-1] if reverse else ids


def scan_order(length, reverse):
    return range(length - 1, -1, -1) if reverse else range(length)


def reference(x, dt, A, B, C, D, dt_bias=None, h0=None, segment_ids=None, reverse=False):
    """Computes the recurrence of the module docstring in float64, one step and row at a time."""
    x, dt, A, B, C, D = (np.asarray(v, np.float64) for v in (x, dt, A, B, C, D))
    if dt_bias is not None:
        dt = np.logaddexp(0, dt + np.asarray(dt_bias, np.float64))
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
    """Returns float64 gradients of sum(y * dy) + sum(h_last * dh), by torch autograd."""
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
    """Returns (y, h_last) and the gradients of sum(y * dy) + sum(h_last * dh)."""
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
    assert {v.dtype for v in outputs} == {jnp.dtype(jnp.float32)}
    assert_close(outputs, reference(**inputs, reverse=reverse))


def lengths(implementation):
    if implementation in KERNELS:  # slow; the tests of gradients use more lengths
        return 1, 128
    if implementation == "associative":
        return 1, 2, 65
    chunk = SMALL_CHUNK[implementation]
    return 1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk + 5


def several_chunks(implementation):
    """A length of several chunks, of which the last one is partial."""
    return 150 if implementation in KERNELS else 45


@pytest.mark.parametrize(
    ("implementation", "length"), [(i, n) for i in IMPLEMENTATIONS for n in lengths(i)]
)
@each_direction
def test_values_equal_the_recurrence(rng, length, reverse, implementation):
    inputs = make_inputs(rng, length, ALL, reverse)
    outputs = scan(**inputs, reverse=reverse, implementation=implementation)
    assert_outputs(outputs, inputs, reverse)


GRADIENT_CASES = {  # length for kernels and for others, options, reverse
    "forward": (300, 45, ALL, False),
    "reverse": (300, 45, ALL, True),
    "forward, nothing optional": (60, 12, (), False),
    "reverse, no segments": (257, 33, ("dt_bias", "h0"), True),
}


@each_implementation
@pytest.mark.parametrize(
    ("kernel_length", "length", "options", "reverse"), GRADIENT_CASES.values(), ids=GRADIENT_CASES
)
def test_gradients_equal_the_recurrence(
    rng, kernel_length, length, options, reverse, implementation
):
    length = kernel_length if implementation in KERNELS else length
    check_gradients(rng, length, options, reverse, implementation)


@pytest.mark.parametrize("implementation", DEFAULT_CHUNK)
def test_gradients_with_the_default_chunk_equal_the_recurrence(rng, implementation, default_chunks):
    check_gradients(rng, DEFAULT_CHUNK[implementation] + 50, ALL, False, implementation)


def check_gradients(rng, length, options, reverse, implementation):
    inputs = make_inputs(rng, length, options, reverse)
    cotangents = make_cotangents(rng, length)
    outputs, got = outputs_and_gradients(
        inputs, *cotangents, reverse=reverse, implementation=implementation
    )
    assert_outputs(outputs, inputs, reverse)
    expected = reference_gradients(inputs, *cotangents, reverse)
    assert got.keys() == expected.keys()
    assert_close(got, expected)


@pytest.mark.parametrize("implementation", XLA)
@each_direction
def test_a_single_row_gives_what_it_gives_in_a_batch(rng, reverse, implementation):
    """A single row is computed without a batch axis."""
    inputs = make_inputs(rng, 45, ALL, reverse)
    cotangents = make_cotangents(rng, 45)
    run = functools.partial(outputs_and_gradients, reverse=reverse, implementation=implementation)
    shared = ("A", "D", "dt_bias")
    rows, summed = [], dict.fromkeys(shared, 0.0)
    for b in range(BATCH):
        one = {name: v if name in shared else v[b : b + 1] for name, v in inputs.items()}
        outputs, grads = run(one, *(v[b : b + 1] for v in cotangents))
        rows.append((outputs, {name: g for name, g in grads.items() if name not in shared}))
        summed = {name: summed[name] + grads[name] for name in shared}
    together = jax.tree.map(lambda *v: np.concatenate(v), *rows)
    assert_close((together[0], together[1] | summed), run(inputs, *cotangents))


@kernels_slowly
@each_direction
def test_segments_equal_running_each_separately(rng, reverse, implementation):
    size, count = several_chunks(implementation), 2
    inputs = make_inputs(rng, count * size, ("dt_bias",))
    ids = np.repeat(np.arange(1, count + 1, dtype=np.int32), size)
    run = functools.partial(scan, reverse=reverse, implementation=implementation)
    y, h = run(**inputs, segment_ids=np.stack([ids] * BATCH))
    separate = []
    for segment in range(1, count + 1):
        steps = {name: inputs[name][:, ids == segment] for name in ("x", "dt", "B", "C")}
        separate.append(run(**(inputs | steps)))
    np.testing.assert_allclose(y, np.concatenate([one[0] for one in separate], axis=1), **TOLERANCE)
    np.testing.assert_allclose(h, separate[0 if reverse else -1][1], **TOLERANCE)


def round_to_bfloat16(inputs):
    return {
        name: jnp.asarray(value, jnp.bfloat16) if name in ("x", "dt", "B", "C") else value
        for name, value in inputs.items()
    }


@each_implementation
def test_bfloat16_rounds_only_inputs_outputs_and_gradients(rng, implementation):
    length = several_chunks(implementation)
    inputs = round_to_bfloat16(make_inputs(rng, length, ALL))
    dy, dh = make_cotangents(rng, length)
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


@kernels_slowly
def test_a_step_of_any_size_gives_finite_values_and_gradients(rng, implementation):
    """Decays from exp(-1600) to nearly one, and step sizes in the linear range of softplus."""
    inputs = make_inputs(rng, 40, ("dt_bias", "h0"))
    inputs["A"] *= 100
    inputs["dt"] = np.resize(np.float32([-1e4, -30, 0, 30, 1e4]), inputs["dt"].shape)
    cotangents = make_cotangents(rng, 40)
    outputs, got = outputs_and_gradients(
        inputs, *cotangents, reverse=False, implementation=implementation
    )
    assert_close(outputs, reference(**inputs))
    assert_close(got, reference_gradients(inputs, *cotangents, reverse=False))


@kernels_slowly
def test_two_parts_with_the_state_between_equal_one_pass(rng, implementation):
    length = several_chunks(implementation)
    cut = length // 2
    inputs = make_inputs(rng, length, ("dt_bias", "h0"))
    y, h = scan(**inputs, implementation=implementation)
    parts, state = [], inputs["h0"]
    for part in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, length)):
        steps = {name: inputs[name][:, part] for name in ("x", "dt", "B", "C")}
        out, state = scan(**(inputs | steps | {"h0": state}), implementation=implementation)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), y, **TOLERANCE)
    np.testing.assert_allclose(state, h, **TOLERANCE)


@kernels_slowly
def test_vmap_gives_what_a_loop_gives(rng, implementation):
    length = several_chunks(implementation)
    many = [make_inputs(rng, length, ("dt_bias", "h0")) for _ in range(2)]
    dy, dh = zip(*[make_cotangents(rng, length) for _ in many], strict=True)
    run = functools.partial(outputs_and_gradients, reverse=True, implementation=implementation)
    stacked = {name: np.stack([one[name] for one in many]) for name in many[0]}
    together = jax.vmap(run)(stacked, np.stack(dy), np.stack(dh))
    for k, one in enumerate(many):
        assert_close(jax.tree.map(lambda v, k=k: v[k], together), run(one, dy[k], dh[k]))


@kernels_slowly
@each_direction
def test_shards_over_batch_and_width_give_what_one_device_gives(rng, reverse, implementation):
    """B and C are replicated over shards of the width, and their gradients summed over them."""
    inputs = widen(make_inputs(rng, several_chunks(implementation), ALL, reverse), 8)
    mesh = jax.make_mesh((2, 4), ("b", "e"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "x": P("b", None, "e"),
        "dt": P("b", None, "e"),
        "A": P("e"),
        "B": P("b"),
        "C": P("b"),
        "D": P("e"),
        "dt_bias": P("e"),
        "h0": P("b", "e"),
        "segment_ids": P("b"),
    }
    run = functools.partial(selective_scan, reverse=reverse, implementation=implementation)
    weights = rng.standard_normal(inputs["x"].shape).astype(np.float32)

    def gradients(function):
        def loss(floats):
            y, h = function(floats | {"segment_ids": inputs["segment_ids"]})
            return jnp.sum(y * weights) + jnp.sum(jnp.sin(h))

        floats = {name: v for name, v in inputs.items() if name != "segment_ids"}
        return jax.jit(jax.value_and_grad(loss))(floats)

    sharded = jax.shard_map(
        lambda kw: run(**kw),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P("b", None, "e"), P("b", "e")),
        check_vma=implementation not in KERNELS,  # interpreted kernels fail the check
    )
    assert_close(gradients(sharded), gradients(lambda kw: run(**kw)))


@pytest.mark.parametrize(
    "implementation", ["pallas_tpu", pytest.param("pallas_gpu", marks=pytest.mark.slow)]
)
def test_a_kernel_under_a_mesh_runs_on_each_devices_part(rng, implementation):
    inputs = make_inputs(rng, 70, ALL)
    inputs = widen(inputs, 8)
    dy = rng.standard_normal(inputs["x"].shape).astype(np.float32)
    dh = rng.standard_normal(inputs["h0"].shape).astype(np.float32)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))):
        got = outputs_and_gradients(inputs, dy, dh, reverse=True, implementation=implementation)
    expected = outputs_and_gradients(inputs, dy, dh, reverse=True, implementation="sequential")
    assert tuple(got[0][0].sharding.spec) == ("data", "context", "tensor")
    assert_close(got, expected)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_lowers_for_its_chip(implementation):
    backend = implementation.removeprefix("pallas_")
    assert fastest(backend, d_state=16) == implementation


def test_a_state_too_large_for_registers_is_left_to_xla():
    assert fastest("gpu", d_state=64) == fastest("tpu", d_state=128) == "chunked"


def refuse(*args, **kwargs):
    raise NotImplementedError("no Triton here")


@pytest.mark.parametrize("missing", ["what it lowers to", "what it is written in"])
def test_a_kernel_that_fails_is_replaced_and_that_is_said_once(monkeypatch, caplog, missing):
    if missing == "what it lowers to":
        monkeypatch.setattr("storm_jax.ops.selective_scan.gpu.forward", refuse)
    else:
        monkeypatch.setitem(sys.modules, "storm_jax.ops.selective_scan.gpu", None)
    selective_scan_module._lowers.cache_clear()
    try:
        assert [fastest("gpu", d_state=16) for _ in range(2)] == ["chunked"] * 2
    finally:
        selective_scan_module._lowers.cache_clear()
    assert len(caplog.records) == 1
    assert "cannot lower the selective scan kernel pallas_gpu" in caplog.text


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_the_kernel_is_chosen_under_a_mesh_and_inside_a_trace(backend):
    selective_scan_module._lowers.cache_clear()

    @jax.jit
    def traced(x):
        assert fastest(backend, d_state=16) == f"pallas_{backend}"
        return x

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, context=1, tensor=4))):
        traced(1.0)


def state_of_every_step(x, dt, A, B, C, D, dt_bias):
    """A scan for which autodiff stores every state."""

    def step(h, now):
        x, dt, B, C = now
        h = jnp.exp(dt[..., None] * A[None]) * h + (dt * x)[..., None] * B[:, None]
        return h, jnp.sum(h * C[:, None], axis=-1)

    h = jnp.zeros((x.shape[0], *A.shape))
    dt = jax.nn.softplus(dt + dt_bias[None, None])
    h, y = jax.lax.scan(step, h, tuple(v.swapaxes(0, 1) for v in (x, dt, B, C)))
    return y.swapaxes(0, 1) + D[None, None] * x, h


def temporary_bytes(function, length, width=64, state=16):
    """Returns XLA's temporary memory for values and all gradients."""
    shapes = [(1, length, width)] * 2 + [(width, state)] + [(1, length, state)] * 2 + [(width,)] * 2
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(*args):
        y, h = function(*args)
        return jnp.sum(y**2) + jnp.sum(h)

    program = jax.jit(jax.grad(loss, argnums=tuple(range(7)))).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes


def growth_of_temporary_bytes(function):
    """Returns the growth in bytes per step."""
    short, long = 8192, 16384
    return (temporary_bytes(function, long) - temporary_bytes(function, short)) / (long - short)


@pytest.mark.parametrize("implementation", ["sequential", "chunked"])
def test_temporary_memory_grows_with_the_inputs_and_not_with_the_states(
    implementation, default_chunks
):
    def run(x, dt, A, B, C, D, dt_bias):
        return selective_scan(x, dt, A, B, C, D, dt_bias=dt_bias, implementation=implementation)

    assert growth_of_temporary_bytes(run) < 4 * 64 * 4  # bytes of four inputs


def test_temporary_memory_of_plain_autodiff_grows_with_the_states():
    """Checks that the test above measures the states."""
    assert growth_of_temporary_bytes(state_of_every_step) > 16 * 64 * 4


def test_unknown_implementation_is_rejected(rng):
    with pytest.raises(ValueError, match="parallel"):
        selective_scan(**make_inputs(rng, 2), implementation="parallel")


@pytest.mark.parametrize("name", ["dt", "B", "C", "D", *ALL])
def test_a_shape_that_does_not_fit_is_named(rng, name):
    inputs = make_inputs(rng, 5, ALL)
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=f"^{name} has shape "):
        selective_scan(**inputs)


def test_a_sequence_without_steps_is_rejected(rng):
    with pytest.raises(ValueError, match="at least one step"):
        selective_scan(**make_inputs(rng, 0))
