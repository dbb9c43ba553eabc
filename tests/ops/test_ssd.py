"""SSD, the scan of Mamba-2: values and gradients for any length, direction, segments, initial state and
groups of heads, under vmap and shard_map; and memory that grows with the inputs, not with the states or
the matrices of chunks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scan_checks import TOLERANCE, assert_close

from storm_jax.ops import ssd as ssd_module
from storm_jax.ops.ssd import ssd

BATCH, HEADS, WIDTH, GROUPS, STATE = 2, 4, 3, 2, 5
CHUNK = 8
SHORT = 61  # steps, less than a span: compiles quickly
SPAN = CHUNK * ssd_module.SIZES["cpu"][1]
ALL = ("dt_bias", "h0", "segment_ids")
NOT_DIFFERENTIABLE = ("segment_ids",)

scan = functools.partial(jax.jit(ssd, static_argnames=("reverse", "chunk")), chunk=CHUNK)
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def make_inputs(rng, length, options=(), reverse=False, groups=GROUPS):
    """Returns fp32 arrays by argument name; decays are slow enough for states to cross spans."""
    bias = "dt_bias" in options
    step = (BATCH, length, HEADS)
    inputs = {
        "x": rng.standard_normal((*step, WIDTH)),
        "dt": rng.standard_normal(step) if bias else rng.uniform(0.01, 0.2, step),
        "A": -rng.uniform(0.05, 0.5, HEADS),
        "B": rng.standard_normal((BATCH, length, groups, STATE)),
        "C": rng.standard_normal((BATCH, length, groups, STATE)),
        "D": rng.standard_normal(HEADS),
        "dt_bias": rng.uniform(-4, -2, HEADS),
        "h0": rng.standard_normal((BATCH, HEADS, WIDTH, STATE)),
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
    """Returns ids that change inside chunks, at the edges of chunks and spans, at adjacent steps and at the
    second step; an id recurs."""
    t = np.arange(length)
    starts = (CHUNK, CHUNK + 1, 2 * CHUNK, 4 * CHUNK + 3, 4 * CHUNK + 5, SPAN, SPAN + 1)
    edges = sum((t >= start).astype(np.int32) for start in starts)
    inside = np.where((t >= 1) & (t < SPAN + 3), 2, 1)
    ids = np.stack([edges, inside]).astype(np.int32)
    return ids[:, ::-1] if reverse else ids


def make_cotangents(rng, length):
    dy = rng.standard_normal((BATCH, length, HEADS, WIDTH)).astype(np.float32)
    dh = rng.standard_normal((BATCH, HEADS, WIDTH, STATE)).astype(np.float32)
    return dy, dh


def reference(inputs, cotangents, reverse=False):
    """Computes the recurrence of the module docstring in float64, one step at a time, and the gradients of
    sum(y * dy) + sum(h_last * dh) by torch autograd."""
    leaves = {
        name: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
        for name, value in inputs.items()
        if name not in NOT_DIFFERENTIABLE
    }
    x, dt, A, B, C, D = (leaves[name] for name in ("x", "dt", "A", "B", "C", "D"))
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], dim=2) for v in (B, C))
    if "dt_bias" in leaves:
        dt = torch.nn.functional.softplus(dt + leaves["dt_bias"])
    h = leaves.get("h0", torch.zeros(*x[:, 0].shape, B.shape[-1], dtype=torch.float64))
    ids = inputs.get("segment_ids", np.zeros(x.shape[:2]))
    by_step, before = {}, None
    for t in range(x.shape[1] - 1, -1, -1) if reverse else range(x.shape[1]):
        if before is not None:
            h = h * torch.tensor(ids[:, t] == ids[:, before])[:, None, None, None]
        before = t
        u = dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        h = torch.exp(dt[:, t] * A)[:, :, None, None] * h + u
        by_step[t] = (h * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t]
    y = torch.stack([by_step[t] for t in range(x.shape[1])], dim=1)
    dy, dh = (torch.tensor(np.asarray(v, np.float64)) for v in cotangents)
    grads = torch.autograd.grad((y * dy).sum() + (h * dh).sum(), list(leaves.values()))
    outputs = y.detach().numpy(), h.detach().numpy()
    return outputs, dict(zip(leaves, (grad.numpy() for grad in grads), strict=True))


def gradients_of(function, inputs, dy, dh):
    """Returns (y, h_last) and the gradients of sum(y * dy) + sum(h_last * dh)."""
    fixed = {name: inputs[name] for name in inputs if name in NOT_DIFFERENTIABLE}

    def loss(floats):
        y, h = function(floats | fixed)
        return jnp.sum(y.astype(jnp.float32) * dy) + jnp.sum(h * dh), (y, h)

    floats = {name: inputs[name] for name in inputs if name not in fixed}
    grads, outputs = jax.grad(loss, has_aux=True)(floats)
    return outputs, grads


@functools.partial(jax.jit, static_argnames=("reverse", "chunk"))
def outputs_and_gradients(inputs, dy, dh, *, reverse=False, chunk=CHUNK):
    return gradients_of(lambda kw: ssd(**kw, reverse=reverse, chunk=chunk), inputs, dy, dh)


LENGTHS = {  # compiling is slow: not every length in both directions
    False: (1, CHUNK - 1, CHUNK + 1, 149),
    True: (2, CHUNK, 2 * SPAN, 149),
}


@pytest.mark.parametrize(("reverse", "length"), [(r, n) for r in LENGTHS for n in LENGTHS[r]])
def test_values_and_gradients_equal_the_recurrence(rng, reverse, length):
    inputs = make_inputs(rng, length, ALL, reverse)
    cotangents = make_cotangents(rng, length)
    got = outputs_and_gradients(inputs, *cotangents, reverse=reverse)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    assert_close(got, reference(inputs, cotangents, reverse))


@pytest.mark.parametrize(("options", "reverse"), [((), False), (("dt_bias", "segment_ids"), True)])
def test_optional_arguments_may_be_omitted(rng, options, reverse):
    inputs = make_inputs(rng, SHORT, options, reverse)
    cotangents = make_cotangents(rng, SHORT)
    got = outputs_and_gradients(inputs, *cotangents, reverse=reverse)
    assert_close(got, reference(inputs, cotangents, reverse))


@pytest.mark.parametrize("groups", [1, HEADS])
def test_heads_may_share_one_group_or_have_one_each(rng, groups):
    inputs = make_inputs(rng, SHORT, ALL, groups=groups)
    cotangents = make_cotangents(rng, SHORT)
    got = outputs_and_gradients(inputs, *cotangents)
    assert_close(got, reference(inputs, cotangents))


def test_the_default_chunk_is_as_good(rng):
    length = 2 * ssd_module.SIZES["cpu"][0] + 5
    inputs = make_inputs(rng, length, ALL)
    cotangents = make_cotangents(rng, length)
    got = outputs_and_gradients(inputs, *cotangents, chunk=None)
    assert_close(got, reference(inputs, cotangents))


@each_direction
def test_segments_equal_running_each_separately(rng, reverse):
    size, count = CHUNK + 3, 2
    inputs = make_inputs(rng, count * size, ("dt_bias",))
    ids = np.repeat(np.arange(count, dtype=np.int32), size)
    run = functools.partial(scan, reverse=reverse)
    y, h = run(**inputs, segment_ids=np.stack([ids] * BATCH))
    separate = [run(**(inputs | steps_of(inputs, ids == segment))) for segment in range(count)]
    np.testing.assert_allclose(y, np.concatenate([one[0] for one in separate], axis=1), **TOLERANCE)
    np.testing.assert_allclose(h, separate[0 if reverse else -1][1], **TOLERANCE)


def steps_of(inputs, part):
    return {name: inputs[name][:, part] for name in ("x", "dt", "B", "C")}


@each_direction
def test_segments_do_not_affect_each_other_however_large_their_values_are(rng, reverse):
    inputs = make_inputs(rng, 30, ("h0",))
    inputs["segment_ids"] = np.tile(np.repeat(np.arange(3, dtype=np.int32), 10), (BATCH, 1))
    y, _ = scan(**inputs, reverse=reverse)
    inputs["x"][:, :10] *= 1e20
    inputs["x"][:, 20:] *= 1e20
    inputs["h0"] *= 1e20
    loud, _ = scan(**inputs, reverse=reverse)
    np.testing.assert_array_equal(y[:, 10:20], loud[:, 10:20])


@each_direction
def test_parts_with_the_state_between_equal_one_pass(rng, reverse):
    inputs = make_inputs(rng, 90, ("dt_bias", "h0"))
    run = functools.partial(scan, reverse=reverse)
    y, h = run(**inputs)
    parts, state = [slice(0, 37), slice(37, 38), slice(38, 90)], inputs["h0"]
    outputs = {}
    for part in reversed(parts) if reverse else parts:
        outputs[part.start], state = run(**(inputs | steps_of(inputs, part) | {"h0": state}))
    together = np.concatenate([outputs[part.start] for part in parts], axis=1)
    np.testing.assert_allclose(together, y, **TOLERANCE)
    np.testing.assert_allclose(state, h, **TOLERANCE)


@each_direction
def test_bfloat16_rounds_operands_and_results_but_no_sum_and_no_state(rng, reverse):
    inputs = {
        name: jnp.asarray(value, jnp.bfloat16) if name in ("x", "dt", "B", "C") else value
        for name, value in make_inputs(rng, SHORT, ALL, reverse).items()
    }
    dy, dh = make_cotangents(rng, SHORT)
    dy = np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float32)
    outputs, grads = outputs_and_gradients(inputs, dy, dh, reverse=reverse)
    expected_outputs, expected_grads = reference(inputs, (dy, dh), reverse)
    assert [v.dtype for v in outputs] == [jnp.bfloat16, jnp.float32]
    for got, expected in zip(outputs, expected_outputs, strict=True):
        assert relative_error(got, expected) <= 5e-3
    for name, expected in expected_grads.items():
        assert grads[name].dtype == inputs[name].dtype, name
        assert relative_error(grads[name], expected) <= 1e-2, name


def relative_error(got, expected):
    return np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max()


@each_direction
def test_a_step_of_any_size_gives_finite_values_and_gradients(rng, reverse):
    """Decays from below exp(-1600) to nearly one, and step sizes in the linear range of softplus."""
    inputs = make_inputs(rng, 60, ALL, reverse)
    inputs["A"] *= 100
    inputs["dt"] = np.resize([-1e4, -30, 0, 30, 1e4, -3, 1], inputs["dt"].shape).astype("f4")
    cotangents = make_cotangents(rng, 60)
    outputs, grads = outputs_and_gradients(inputs, *cotangents, reverse=reverse, chunk=60)
    expected_outputs, expected_grads = reference(inputs, cotangents, reverse)
    assert_close(outputs, expected_outputs)
    for name, expected in expected_grads.items():  # gradients through a decay cancel terms of 1e4
        error = relative_error(grads[name], expected)
        assert error <= (1e-3 if name in ("A", "dt", "dt_bias") else 1e-5), name


def test_large_steps_leave_the_decay_between_small_ones_precise(rng):
    """A plain cumulative sum of log decays over the chunk would round the small ones away."""
    inputs = make_inputs(rng, 60)
    inputs["dt"][:, ::5] = 1e6
    inputs["x"][:, ::5] *= 1e-6
    cotangents = make_cotangents(rng, 60)
    got = outputs_and_gradients(inputs, *cotangents, chunk=60)
    assert_close(got, reference(inputs, cotangents))


def test_vmap_equals_the_recurrence(rng):
    many = [make_inputs(rng, SHORT, ("dt_bias", "h0")) for _ in range(2)]
    cotangents = [make_cotangents(rng, SHORT) for _ in many]
    dy, dh = (np.stack(v) for v in zip(*cotangents, strict=True))
    stacked = {name: np.stack([one[name] for one in many]) for name in many[0]}
    together = jax.vmap(functools.partial(outputs_and_gradients, reverse=True))(stacked, dy, dh)
    for k, one in enumerate(many):
        got = jax.tree.map(lambda v, k=k: v[k], together)
        assert_close(got, reference(one, cotangents[k], reverse=True))


@pytest.mark.parametrize(("groups", "reverse"), [(1, True), (HEADS, False)])
def test_shards_over_batch_and_heads_equal_the_recurrence(rng, groups, reverse):
    """With a single group, B and C are replicated over shards of the heads, and their gradients summed over
    them."""
    inputs = make_inputs(rng, SHORT, ALL, reverse, groups=groups)
    mesh = jax.make_mesh((2, 4), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
    by_step, by_head = P("b", None, "h"), P("h")
    by_group = by_step if groups == HEADS else P("b")
    specs = {
        "x": by_step,
        "dt": by_step,
        "A": by_head,
        "B": by_group,
        "C": by_group,
        "D": by_head,
        "dt_bias": by_head,
        "h0": P("b", "h"),
        "segment_ids": P("b"),
    }
    sharded = jax.shard_map(
        lambda kw: ssd(**kw, reverse=reverse, chunk=CHUNK),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(by_step, P("b", "h")),
        check_vma=True,
    )
    cotangents = make_cotangents(rng, SHORT)
    got = jax.jit(functools.partial(gradients_of, sharded))(inputs, *cotangents)
    assert_close(got, reference(inputs, cotangents, reverse))


def all_chunks_at_once(x, dt, A, B, C, D):
    """SSD with a single span and JAX's own gradient, to check that the test measures its matrices."""
    options = ssd_module.Options(chunk=64, span=x.shape[1], reverse=False)
    params = ssd_module.Params(A, D, None)
    h = jnp.zeros((*x[:, 0].shape, B.shape[-1]))
    return ssd_module._solve_span(options, ssd_module.Steps(x, dt, B, C), None, params, h)


def temporary_bytes(function, length, heads=4, width=16, state=32):
    """Returns XLA's temporary memory for values and all gradients."""
    steps = (1, length, heads)
    shapes = [(*steps, width), steps, (heads,), *[(1, length, 1, state)] * 2, (heads,)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(*args):
        y, h = function(*args)
        return jnp.sum(y**2) + jnp.sum(h)

    program = jax.jit(jax.grad(loss, argnums=tuple(range(6)))).lower(*arguments).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_temporary_memory_grows_with_the_inputs_and_not_with_states_or_matrices():
    short, long = 2048, 4096
    inputs = (
        4 * 16 + 4 + 2 * 32
    )  # values per step of x, dt, B and C; a chunk's matrices have 4 * 64
    growth = (temporary_bytes(ssd, long) - temporary_bytes(ssd, short)) / (long - short)
    assert growth < 1.5 * inputs * 4
    assert temporary_bytes(all_chunks_at_once, short) / short > 8 * inputs * 4


def test_heads_that_groups_do_not_divide_are_rejected(rng):
    with pytest.raises(ValueError, match="4 heads"):
        ssd(**make_inputs(rng, 2, groups=3))
