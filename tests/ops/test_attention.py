"""Attention: which keys a query attends to, with one and several blocks of queries and keys, fp32 logits, and memory
that does not grow with the keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from storm_jax.ops.attention import KeyRange, attention, causal_keys, xla
from storm_jax.ops.attention.xla import BLOCK

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 3
RAGGED = BLOCK + 7

attend = jax.jit(attention)


def make_qkv(rng, queries, keys, kv_heads=KV_HEADS):
    shapes = {
        "q": (BATCH, queries, HEADS, HEAD_DIM),
        "k": (BATCH, keys, kv_heads, HEAD_DIM),
        "v": (BATCH, keys, kv_heads, HEAD_DIM),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def segments(length):
    """Rows of three samples and padding."""
    cuts = np.array([[length // 5, length // 2, length - 3], [1, length // 3, length - 1]])
    ids = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    ids[ids == 4] = 0
    return ids


def packed(length):
    return jax.tree.map(np.asarray, causal_keys(jnp.asarray(segments(length))))


def causal(length):
    last = np.tile(np.arange(length), (BATCH, 1))
    return KeyRange(np.zeros_like(last), last)


def cached(queries, keys):
    """Queries that continue at different places in two rows of a cache."""
    last = np.array([[0], [keys - queries]]) + np.arange(queries)
    return KeyRange(np.zeros_like(last), last)


def windows(queries, keys):
    """Ranges that start and end anywhere."""
    rng = np.random.default_rng(0)
    ends = rng.integers(keys, size=(2, BATCH, queries))
    return KeyRange(ends.min(0), ends.max(0))


def reference(q, k, v, keys=None):
    """Computes attention in float64 with all logits at once; differentiable."""
    k, v = (heads.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for heads in (k, v))
    logits = torch.einsum("bshk,bthk->bhst", q, k) / q.shape[-1] ** 0.5
    if keys is not None:
        slots = np.arange(k.shape[1])
        visible = (keys.first[..., None] <= slots) & (slots <= keys.last[..., None])
        logits = logits.masked_fill(~torch.tensor(visible)[:, None], -torch.inf)
    return torch.einsum("bhst,bthk->bshk", logits.softmax(-1), v)


def to_float64(qkv):
    return {
        name: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
        for name, value in qkv.items()
    }


CASES = {
    "one": (1, 1, None),
    "full": (5, 9, None),
    "full in blocks": (RAGGED, 2 * BLOCK + 3, None),
    "causal, one whole block": (BLOCK, BLOCK, causal(BLOCK)),
    "packed": (20, 20, packed(20)),
    "packed in blocks": (2 * BLOCK + 1, 2 * BLOCK + 1, packed(2 * BLOCK + 1)),
    "cached": (1, 9, cached(1, 9)),
    "cached in blocks": (RAGGED, RAGGED + 5, cached(RAGGED, RAGGED + 5)),
    "one query, many keys": (1, 30 * BLOCK, cached(1, 30 * BLOCK)),
    "windows": (RAGGED, 3 * BLOCK - 1, windows(RAGGED, 3 * BLOCK - 1)),
}


def test_packed_samples_attend_to_themselves_and_padding_to_itself():
    keys = packed(10)
    first, last = keys.first, keys.last
    np.testing.assert_array_equal(first[0], [0, 0, 2, 2, 2, 5, 5, 7, 8, 9])
    np.testing.assert_array_equal(first[1], [0, 1, 1, 3, 3, 3, 3, 3, 3, 9])
    np.testing.assert_array_equal(last, [np.arange(10)] * 2)


def assert_equals_the_reference(rng, case, implementation):
    """Values and gradients equal a softmax over the visible keys."""
    queries, length, keys = CASES[case]
    qkv = make_qkv(rng, queries, length)
    dy = rng.standard_normal(qkv["q"].shape).astype(np.float32)

    @jax.jit
    def gradients(qkv):
        def loss(qkv):
            y = attention(**qkv, keys=keys, implementation=implementation)
            return jnp.sum(y * dy), y

        return jax.grad(loss, has_aux=True)(qkv)

    got, y = gradients(qkv)
    leaves = to_float64(qkv)
    expected = reference(**leaves, keys=keys)
    (expected * torch.tensor(dy)).sum().backward()
    np.testing.assert_allclose(y, expected.detach(), **TOLERANCE)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(got[name], leaf.grad, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(rng, case):
    assert_equals_the_reference(rng, case, "xla")


@pytest.mark.parametrize("case", ["full", "full in blocks", "packed in blocks"])
def test_the_kernel_of_tpus(rng, case):
    """Interpreted, in float32."""
    assert_equals_the_reference(rng, case, "splash")


def test_other_platforms_take_all_keys_at_once(rng, monkeypatch):
    monkeypatch.setattr(xla, "platform", lambda: "gpu")
    assert_equals_the_reference(rng, "packed in blocks", "xla")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_neighbouring_query_heads_share_a_key_head(rng, kv_heads):
    qkv = make_qkv(rng, 6, 6, kv_heads)
    expected = reference(**to_float64(qkv), keys=causal(6)).detach()
    np.testing.assert_allclose(attend(**qkv, keys=causal(6)), expected, **TOLERANCE)


def test_other_samples_of_a_row_change_nothing(rng):
    qkv, keys, ids = make_qkv(rng, RAGGED, RAGGED), packed(RAGGED), segments(RAGGED)
    y = np.asarray(attend(**qkv, keys=keys))
    noise = np.where((ids == 2)[..., None, None], 0, 100).astype(np.float32)
    other = np.asarray(attend(**{name: value + noise for name, value in qkv.items()}, keys=keys))
    np.testing.assert_array_equal(other[ids == 2], y[ids == 2])
    assert not np.allclose(other[ids == 1], y[ids == 1])


def test_keys_outside_the_range_of_a_block_are_not_read(rng):
    """Whole blocks are skipped: a NaN in one of them would spread through a product with zero."""
    length = 4 * BLOCK
    qkv = make_qkv(rng, length, length)
    for name in ("k", "v"):
        qkv[name][:, :BLOCK] = qkv[name][:, 3 * BLOCK :] = np.nan
    keys = causal(length)
    keys = KeyRange(keys.first + BLOCK, keys.last)
    y = np.asarray(attend(**qkv, keys=keys))
    assert np.isfinite(y[:, BLOCK : 3 * BLOCK]).all()


def test_bfloat16_has_fp32_logits(rng):
    qkv, keys = make_qkv(rng, RAGGED, RAGGED), causal(RAGGED)
    qkv["q"] *= 20  # with logits this large, bfloat16 would change each weight by about a tenth
    qkv = {name: jnp.asarray(value, jnp.bfloat16) for name, value in qkv.items()}
    y = attend(**qkv, keys=keys)
    expected = reference(**to_float64(qkv), keys=keys).detach()
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-7)


def test_memory_of_the_gradient_does_not_grow_with_the_square_of_the_length():
    def temporaries(length):
        q, kv = (
            jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.float32)
            for heads in (HEADS, KV_HEADS)
        )
        last = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, last):
            return attention(q, k, v, KeyRange(jnp.zeros_like(last), last)).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, last).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16 * BLOCK) < 2.5 * temporaries(8 * BLOCK)
