"""The causal convolution: taps in torch's order that do not cross segments or the ends of a row, in both
directions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from storm_jax.ops.causal_conv import causal_conv

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
BATCH, WIDTH = 2, 3

each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
conv = jax.jit(causal_conv, static_argnames="reverse")


def make_inputs(rng, length, taps):
    shapes = {"x": (BATCH, length, WIDTH), "kernel": (taps, WIDTH), "bias": (WIDTH,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_segments(length):
    """Returns a row that starts with id 0, like padding, and one with a segment of a single step."""
    t = np.arange(length)
    return np.stack([t >= 2, 1 + (t >= 3) + (t >= 4)]).astype(np.int32)


def to_float64(inputs):
    return {
        name: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
        for name, value in inputs.items()
    }


def reference(x, kernel, bias, segment_ids, reverse):
    """Computes one output and one tap at a time, in float64; differentiable."""
    length, taps = x.shape[1], len(kernel)
    steps = []
    for t in range(length):
        total = bias.expand(len(x), -1)
        for j in range(taps):
            source = t + j if reverse else t - j
            if 0 <= source < length:
                same = torch.tensor(segment_ids[:, source] == segment_ids[:, t])
                total = total + same[:, None] * kernel[taps - 1 - j] * x[:, source]
        steps.append(total)
    return torch.stack(steps, dim=1)


@each_direction
@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (3, 4), (9, 4), (9, 2)])
def test_values_and_gradients_equal_the_sum_over_taps(rng, length, taps, segmented, reverse):
    inputs = make_inputs(rng, length, taps)
    ids = make_segments(length) if segmented else None
    dy = rng.standard_normal((BATCH, length, WIDTH)).astype(np.float32)

    @jax.jit
    def loss(inputs):
        y, _ = causal_conv(**inputs, segment_ids=ids, reverse=reverse)
        return jnp.sum(y * dy), y

    got, y = jax.grad(loss, has_aux=True)(inputs)
    leaves = to_float64(inputs)
    some_ids = np.ones((BATCH, length)) if ids is None else ids
    expected = reference(**leaves, segment_ids=some_ids, reverse=reverse)
    (expected * torch.tensor(dy)).sum().backward()
    np.testing.assert_allclose(y, expected.detach(), **TOLERANCE)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(got[name], leaf.grad, **TOLERANCE, err_msg=name)


def test_taps_are_in_the_order_of_a_padded_conv1d(rng):
    inputs = make_inputs(rng, 9, 4)
    x, kernel, bias = (torch.tensor(inputs[name]).double() for name in ("x", "kernel", "bias"))
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    expected = torch.nn.functional.conv1d(padded, kernel.T[:, None], bias, groups=WIDTH).mT
    np.testing.assert_allclose(conv(**inputs)[0], expected, **TOLERANCE)


@each_direction
def test_segments_equal_convolving_each_separately(rng, reverse):
    inputs = make_inputs(rng, 10, 4)
    ids = np.repeat([[1, 2]] * BATCH, 5, axis=1)
    run = functools.partial(conv, reverse=reverse)
    separate = [run(**(inputs | {"x": x}))[0] for x in np.split(inputs["x"], 2, axis=1)]
    whole, _ = run(**inputs, segment_ids=ids)
    np.testing.assert_allclose(whole, np.concatenate(separate, axis=1), **TOLERANCE)


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
def test_output_has_the_dtype_of_x(rng, weights):
    inputs = make_inputs(rng, 9, 4)
    typed = {name: jnp.asarray(v, weights) for name, v in inputs.items()}
    typed["x"] = typed["x"].astype(jnp.bfloat16)
    y, _ = conv(**typed)
    assert y.dtype == jnp.bfloat16
    expected = reference(**to_float64(typed), segment_ids=np.ones((BATCH, 9)), reverse=False)
    # At most one rounding per tap, of sums up to about 8.
    np.testing.assert_allclose(y.astype(jnp.float32), expected.detach(), atol=0.05)


@each_direction
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (4, 8), (1, 2, 3, 9)])
def test_parts_with_a_cache_equal_one_pass(rng, cuts, reverse):
    """Includes parts that are shorter than the kernel."""
    inputs = make_inputs(rng, 10, 4)
    whole, last = conv(**inputs, reverse=reverse)
    parts = np.split(inputs["x"], cuts, axis=1)
    cache, found = None, []
    for part in parts[::-1] if reverse else parts:
        y, cache = conv(**(inputs | {"x": part}), reverse=reverse, cache=cache)
        found.append(y)
    found = found[::-1] if reverse else found
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, **TOLERANCE)
    np.testing.assert_allclose(cache, last, **TOLERANCE)


def test_only_the_first_segment_reads_the_cache(rng):
    inputs = make_inputs(rng, 6, 4)
    cache = rng.standard_normal((BATCH, 3, WIDTH)).astype(np.float32)
    ids = np.array([[1, 2, 2, 2, 2, 2]] * BATCH, np.int32)
    found, _ = conv(**inputs, segment_ids=ids, cache=cache)
    first, _ = conv(**(inputs | {"x": inputs["x"][:, :1]}), cache=cache)
    second, _ = conv(**(inputs | {"x": inputs["x"][:, 1:]}))
    np.testing.assert_allclose(found, np.concatenate([first, second], axis=1), **TOLERANCE)
