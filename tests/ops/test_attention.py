"""Attention: which keys a query attends to (positions, segments, key heads), with one and several chunks of
queries, fp32 logits, and without materialising the logits of all queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from storm_jax.ops.attention import QUERY_CHUNK, attention

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 3
RAGGED = QUERY_CHUNK + 7
MASKS = ("q_positions", "kv_positions", "q_segments", "kv_segments")

attend = jax.jit(attention)


def make_qkv(rng, queries, keys, kv_heads=KV_HEADS):
    shapes = {
        "q": (BATCH, queries, HEADS, HEAD_DIM),
        "k": (BATCH, keys, kv_heads, HEAD_DIM),
        "v": (BATCH, keys, kv_heads, HEAD_DIM),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def causal(length):
    positions = np.tile(np.arange(length), (BATCH, 1))
    return {"q_positions": positions, "kv_positions": positions}


def packed(length):
    """Rows of three samples and padding; positions restart in each sample, as in packed batches."""
    cuts = np.array([[length // 5, length // 2, length - 3], [1, length // 3, length - 1]])
    t = np.arange(length)
    segments = 1 + (t[None, :, None] >= cuts[:, None]).sum(-1)
    starts = np.concatenate([np.zeros((BATCH, 1), int), cuts], axis=1)
    positions = t - np.take_along_axis(starts, segments - 1, axis=1)
    segments[segments == 4] = 0
    masks = causal(length) | {"q_positions": positions, "kv_positions": positions}
    return masks | {"q_segments": segments, "kv_segments": segments}


def cached(queries, keys):
    """Queries at different positions in two rows, and keys whose positions are shared by all rows."""
    starts = np.array([[0], [keys - queries]])
    return {"q_positions": starts + np.arange(queries), "kv_positions": np.arange(keys)[None]}


def reference(q, k, v, q_positions=None, kv_positions=None, q_segments=None, kv_segments=None):
    """Computes attention in float64 with all logits at once; differentiable."""
    k, v = (heads.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for heads in (k, v))
    logits = torch.einsum("bshk,bthk->bhst", q, k) / q.shape[-1] ** 0.5
    if q_positions is not None:
        visible = kv_positions[:, None] <= q_positions[..., None]
        if q_segments is not None:
            visible = visible & (kv_segments[:, None] == q_segments[..., None])
        assert visible.any(-1).all()
        logits = logits.masked_fill(~torch.tensor(visible)[:, None], -torch.inf)
    return torch.einsum("bhst,bthk->bshk", logits.softmax(-1), v)


def to_float64(qkv):
    return {
        name: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
        for name, value in qkv.items()
    }


CASES = {
    "full": (5, 9, {}),
    "full in chunks": (RAGGED, 9, {}),
    "causal, one whole chunk": (QUERY_CHUNK, QUERY_CHUNK, causal(QUERY_CHUNK)),
    "packed": (20, 20, packed(20)),
    "packed in chunks": (2 * QUERY_CHUNK + 1, 2 * QUERY_CHUNK + 1, packed(2 * QUERY_CHUNK + 1)),
    "cached": (1, 9, cached(1, 9)),
    "cached in chunks": (RAGGED, RAGGED + 5, cached(RAGGED, RAGGED + 5)),
}


@pytest.mark.parametrize(("queries", "keys", "masks"), CASES.values(), ids=CASES)
def test_values_and_gradients_equal_a_softmax_over_visible_keys(rng, queries, keys, masks):
    qkv = make_qkv(rng, queries, keys)
    dy = rng.standard_normal(qkv["q"].shape).astype(np.float32)

    @jax.jit
    def gradients(qkv):
        def loss(qkv):
            y = attention(**qkv, **{name: jnp.asarray(mask) for name, mask in masks.items()})
            return jnp.sum(y * dy), y

        return jax.grad(loss, has_aux=True)(qkv)

    got, y = gradients(qkv)
    leaves = to_float64(qkv)
    expected = reference(**leaves, **masks)
    (expected * torch.tensor(dy)).sum().backward()
    np.testing.assert_allclose(y, expected.detach(), **TOLERANCE)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(got[name], leaf.grad, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_neighbouring_query_heads_share_a_key_head(rng, kv_heads):
    qkv = make_qkv(rng, 6, 6, kv_heads)
    expected = reference(**to_float64(qkv), **causal(6)).detach()
    np.testing.assert_allclose(attend(**qkv, **causal(6)), expected, **TOLERANCE)


def test_other_samples_of_a_row_change_nothing(rng):
    qkv, masks = make_qkv(rng, RAGGED, RAGGED), packed(RAGGED)
    segments = masks["q_segments"]
    y = np.asarray(attend(**qkv, **masks))
    noise = np.where((segments == 2)[..., None, None], 0, 100).astype(np.float32)
    other = np.asarray(attend(**{name: value + noise for name, value in qkv.items()}, **masks))
    np.testing.assert_array_equal(other[segments == 2], y[segments == 2])
    assert not np.allclose(other[segments == 1], y[segments == 1])


def test_bfloat16_has_fp32_logits(rng):
    qkv, masks = make_qkv(rng, RAGGED, RAGGED), causal(RAGGED)
    qkv["q"] *= 20  # with logits this large, bfloat16 would change each weight by about a tenth
    qkv = {name: jnp.asarray(value, jnp.bfloat16) for name, value in qkv.items()}
    y = attend(**qkv, **masks)
    expected = reference(**to_float64(qkv), **masks).detach()
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-7)


def test_gradient_never_holds_the_logits_of_all_queries():
    length = 16 * QUERY_CHUNK
    q, kv = (
        jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.float32)
        for heads in (HEADS, KV_HEADS)
    )
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, positions):
        return attention(q, k, v, q_positions=positions, kv_positions=positions).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, positions).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * HEADS * length**2
