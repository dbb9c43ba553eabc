"""Token merging: which neighbours and frames go into a token; partial cells and groups average only the
tokens and frames they have."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from storm_jax.ops import pooling

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
ONE_ROUNDING = {"rtol": 2**-8, "atol": 0}  # to bfloat16
WIDTH = 3

pixel_shuffle = jax.jit(pooling.pixel_shuffle, static_argnums=1)
temporal_pool = jax.jit(pooling.temporal_pool, static_argnums=2)
spatial_pool = jax.jit(pooling.spatial_pool, static_argnums=1)


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def naive_shuffle(x, factor):
    side = math.isqrt(x.shape[1])
    cells = math.ceil(side / factor)
    y = np.zeros((len(x), cells * cells, factor * factor * WIDTH), x.dtype)
    for row in range(side):
        for column in range(side):
            cell = row // factor * cells + column // factor
            start = (row % factor * factor + column % factor) * WIDTH
            y[:, cell, start : start + WIDTH] = x[:, row * side + column]
    return y


def naive_temporal(x, frame_group, num_groups):
    y = np.zeros((len(x), num_groups, *x.shape[2:]))
    for b, groups in enumerate(frame_group):
        for g in range(num_groups):
            frames = [x[b, f].astype(np.float64) for f in range(len(groups)) if groups[f] == g]
            if frames:
                y[b, g] = np.mean(frames, axis=0)
    return y


def naive_spatial(x, factor):
    side = math.isqrt(x.shape[-2])
    grid = x.reshape(*x.shape[:-2], side, side, x.shape[-1]).astype(np.float64)
    starts = range(0, side, factor)
    cells = [
        grid[..., row : row + factor, column : column + factor, :].mean(axis=(-3, -2))
        for row in starts
        for column in starts
    ]
    return np.stack(cells, axis=-2)


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_pixel_shuffle_is_row_major_with_zeros_beyond_the_edge(rng, side, factor):
    x = draw(rng, 2, side * side, WIDTH)
    np.testing.assert_array_equal(pixel_shuffle(x, factor), naive_shuffle(x, factor))


FRAME_GROUPS = {
    "ragged last group": [[0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3]],
    "sampled out": [[0, 0, -1, -1, 1, 1, -1], [-1, 0, -1, 1, -1, 2, -1]],
    "padding": [[0, 1, 1, 2, 3, -1, -1], [-1] * 7],
    "group without frames": [[0, 0, 2, 2, 3, 3, 3], [3, 3, 3, 3, 3, 3, 3]],
    "own group": [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]],
}


@pytest.mark.parametrize("frame_group", FRAME_GROUPS.values(), ids=FRAME_GROUPS)
def test_temporal_pool_is_the_mean_of_the_frames_of_each_group(rng, frame_group):
    x, frame_group = draw(rng, 2, 7, 4, WIDTH), np.array(frame_group, np.int32)
    got = temporal_pool(x, frame_group, 7)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, naive_temporal(x, frame_group, 7), **TOLERANCE)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=["one grid", "frames of rows"])
@pytest.mark.parametrize("factor", [1, 2, 3, 8])
@pytest.mark.parametrize("side", [1, 4, 5, 7])
def test_spatial_pool_is_the_mean_of_the_tokens_of_each_cell(rng, side, factor, lead):
    x = draw(rng, *lead, side * side, WIDTH)
    got = spatial_pool(x, factor)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, naive_spatial(x, factor), **TOLERANCE)


def test_bfloat16_means_round_once(rng):
    """Long sums of values with one sign, so that rounding within the sum would show."""
    x = jnp.asarray(rng.uniform(1, 2, (2, 100, 9, WIDTH)), jnp.bfloat16)
    frame_group = np.repeat([[0, 1]] * 2, 50, axis=1)
    exact = np.asarray(x, np.float64)
    means = temporal_pool(x, frame_group, 2)
    assert means.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        means.astype(jnp.float32), naive_temporal(exact, frame_group, 2), **ONE_ROUNDING
    )
    grid = x.reshape(2, 900, WIDTH)
    means = spatial_pool(grid, 7)
    assert means.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        means.astype(jnp.float32), naive_spatial(exact.reshape(grid.shape), 7), **ONE_ROUNDING
    )


@pytest.mark.parametrize("pool", [pixel_shuffle, spatial_pool])
def test_tokens_that_do_not_form_a_square_grid_are_rejected(rng, pool):
    with pytest.raises(ValueError, match="6 tokens do not form a square grid"):
        pool(draw(rng, 2, 6, WIDTH), 2)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 5), (2, 8)])
def test_a_clip_pooled_in_blocks_gives_the_groups_of_one_pass(rng, cuts, size):
    x = rng.standard_normal((2, 9, 3, 2)).astype(np.float32)
    group, found = pooling.PartialGroup.empty(2, 3, 2), []
    for block in np.split(x, cuts, axis=1):
        means, full, group = pooling.temporal_pool_block(block, group, size)
        assert full[0] == full[1] <= means.shape[1]
        found.append(means[:, : full[0]])
    if 9 % size:
        found.append(group.mean()[:, None])
    numbers = np.broadcast_to(np.arange(9) // size, (2, 9))
    expected = pooling.temporal_pool(x, numbers, math.ceil(9 / size))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=1e-6, atol=1e-6)
    assert (np.asarray(group.num_frames) == 9 % size).all()


def test_rows_may_be_at_different_frames_of_their_group(rng):
    x = rng.standard_normal((2, 5, 1, 1)).astype(np.float32)
    group = pooling.PartialGroup(np.ones((2, 1, 1), np.float32), np.array([2, 0], np.int32))
    means, full, group = pooling.temporal_pool_block(x, group, 3)
    np.testing.assert_array_equal(full, [2, 1])
    np.testing.assert_array_equal(group.num_frames, [1, 2])
    expected = [(1 + x[0, 0, 0, 0]) / 3, x[0, 1:4].mean()]
    np.testing.assert_allclose(means[0, :2, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(group.total[1, 0, 0], x[1, 3:].sum(), rtol=1e-6)


@pytest.mark.parametrize("side", [2, 3, 4, 7, 27])
@pytest.mark.parametrize("method", ["bilinear", "average", "max"])
def test_a_halved_grid_equals_torch(rng, method, side):
    x = draw(rng, 2, 3, side * side, WIDTH)
    cells = torch.from_numpy(x.reshape(6, side, side, WIDTH)).double().permute(0, 3, 1, 2)
    functional = torch.nn.functional
    expected = {
        "average": lambda: functional.avg_pool2d(cells, 2),
        "max": lambda: functional.max_pool2d(cells, 2),
        "bilinear": lambda: functional.interpolate(
            cells, size=[-(-side // 2)] * 2, mode="bilinear"
        ),
    }[method]()
    found = jax.jit(pooling.halve_grid, static_argnums=1)(x, method)
    expected = expected.permute(0, 2, 3, 1).reshape(2, 3, -1, WIDTH)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    np.testing.assert_allclose(
        pooling.halve_grid(x.astype(jnp.bfloat16), method).astype(np.float32), expected, atol=0.05
    )
