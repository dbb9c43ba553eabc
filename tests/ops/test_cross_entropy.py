"""The loss: exact weighted sums for any number of chunks, tokens of weight zero that have no effect, and
logits that are never materialised for a whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from storm_jax.ops.cross_entropy import TOKEN_CHUNK, cross_entropy

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
BATCH, WIDTH, VOCABULARY = 2, 4, 11

sums = jax.jit(cross_entropy)


@jax.jit
def sums_and_gradients(hidden, head, targets, weights):
    """Returns the three sums, and the gradients of the summed loss."""

    def loss(hidden, head):
        totals = cross_entropy(hidden, head, targets, weights)
        return totals[0], totals

    grads, totals = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
    return totals, grads


def make_inputs(rng, length):
    """Draws inputs; weights are 0, 0.5 and 1."""
    return {
        "hidden": rng.standard_normal((BATCH, length, WIDTH)).astype(np.float32),
        "head": rng.standard_normal((WIDTH, VOCABULARY)).astype(np.float32),
        "targets": rng.integers(0, VOCABULARY, (BATCH, length)),
        "weights": (rng.integers(0, 3, (BATCH, length)) / 2).astype(np.float32),
    }


def reference(hidden, head, targets, weights):
    """Computes all log-probabilities at once in float64; the summed loss is differentiable."""
    log_p = torch.log_softmax(hidden @ head, dim=-1)
    targets = torch.tensor(targets)
    loss = -log_p.gather(-1, targets[..., None])[..., 0]
    right = log_p.argmax(-1) == targets
    return (loss * weights).sum(), weights.sum(), (right * weights).sum()


def to_float64(inputs):
    return {
        name: value
        if name == "targets"
        else torch.tensor(np.asarray(value, np.float64), requires_grad=True)
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("length", [1, TOKEN_CHUNK, TOKEN_CHUNK + 1, 2 * TOKEN_CHUNK + 100])
def test_sums_and_gradients_equal_log_softmax(rng, length):
    inputs = make_inputs(rng, length)
    leaves = to_float64(inputs)
    expected = reference(**leaves)
    expected[0].backward()
    got, gradients = sums_and_gradients(**inputs)
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == jnp.float32
        assert value.shape == ()
        np.testing.assert_allclose(value, wanted.detach(), **TOLERANCE)
    for name, value in zip(("hidden", "head"), gradients, strict=True):
        wanted = leaves[name].grad.numpy()
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(value / scale, wanted / scale, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("length", [5, TOKEN_CHUNK + 1])
def test_tokens_of_weight_zero_count_nowhere(rng, length):
    inputs = make_inputs(rng, length)
    inputs["weights"][:, 0], inputs["weights"][:, -1] = 0, 1
    out = inputs["weights"] == 0
    changed = inputs | {
        "hidden": np.where(out[..., None], -3 * inputs["hidden"], inputs["hidden"]),
        "targets": np.where(out, (inputs["targets"] + 1) % VOCABULARY, inputs["targets"]),
    }
    totals, (d_hidden, d_head) = sums_and_gradients(**inputs)
    changed_totals, (_, changed_d_head) = sums_and_gradients(**changed)
    np.testing.assert_array_equal(changed_totals, totals)
    assert not d_hidden[out].any()
    assert (np.abs(d_hidden[~out]).max(axis=-1) > 0).all()
    np.testing.assert_allclose(changed_d_head, d_head, **TOLERANCE)


def test_no_weight_at_all_gives_zeros(rng):
    inputs = make_inputs(rng, 5)
    inputs["weights"][:] = 0
    totals, (d_hidden, d_head) = sums_and_gradients(**inputs)
    np.testing.assert_array_equal(totals, [0, 0, 0])
    assert not d_hidden.any()
    assert not d_head.any()


def test_chunks_without_an_answer_are_not_computed(rng):
    """A NaN in one would spread through a product with zero."""
    inputs = make_inputs(rng, 3 * TOKEN_CHUNK)
    inputs["weights"][:, TOKEN_CHUNK : 2 * TOKEN_CHUNK] = 0
    expected, (d_hidden, d_head) = sums_and_gradients(**inputs)
    inputs["hidden"][:, TOKEN_CHUNK : 2 * TOKEN_CHUNK] = np.nan
    totals, gradients = sums_and_gradients(**inputs)
    np.testing.assert_array_equal(totals, expected)
    np.testing.assert_array_equal(gradients[0], d_hidden)
    np.testing.assert_array_equal(gradients[1], d_head)


def test_sums_of_shards_add_up(rng):
    inputs = make_inputs(rng, TOKEN_CHUNK + 1)
    parts = [
        {name: v if name == "head" else v[:, cols] for name, v in inputs.items()}
        for cols in (slice(700), slice(700, None))
    ]
    total = sum(np.stack(sums(**part)) for part in parts)
    np.testing.assert_allclose(total, sums(**inputs), **TOLERANCE)


def test_huge_logits_neither_overflow_nor_vanish(rng):
    inputs = make_inputs(rng, 5)
    inputs["head"] *= 1e4
    expected = reference(**to_float64(inputs))
    np.testing.assert_allclose(sums(**inputs)[0], expected[0].detach(), **TOLERANCE)


def test_bfloat16_inputs_have_fp32_logits_and_sums(rng):
    inputs = make_inputs(rng, TOKEN_CHUNK + 1)
    for name in ("hidden", "head"):
        inputs[name] = jnp.asarray(inputs[name], jnp.bfloat16)
    got = sums(**inputs)
    for value, wanted in zip(got, reference(**to_float64(inputs)), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, wanted.detach(), **TOLERANCE)


def test_gradient_never_holds_the_logits_of_a_row():
    length, vocabulary = 64 * TOKEN_CHUNK, 64
    arguments = [
        jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((WIDTH, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((1, length), jnp.float32),
    ]
    memory = sums_and_gradients.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * length * vocabulary
