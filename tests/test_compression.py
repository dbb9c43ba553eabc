"""The compression plan: its counts match the closed form, and its indices point at the tokens that the
model's pooling puts into the visual table."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm_jax.compression import Grid, VisualShape, plan_clip, pooled_side, visual_index
from storm_jax.config import CompressionConfig
from storm_jax.ops import pooling

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
FRAME_SLOTS, GROUP_SLOTS, WIDTH = 24, 20, 3

temporal_pool = jax.jit(pooling.temporal_pool, static_argnums=2)
spatial_pool = jax.jit(pooling.spatial_pool, static_argnums=1)
repeatable = settings(derandomize=True, database=None)
pool_sizes = st.integers(1, 9)


def compression(k, p, s):
    return CompressionConfig(num_frames=8, temporal_pool=k, spatial_pool=p, temporal_sample=s)


@repeatable
@given(st.integers(2, 200), st.integers(1, 30), pool_sizes, pool_sizes, pool_sizes)
def test_video_plan_is_the_closed_form(num_frames, side, k, p, s):
    plan = plan_clip(num_frames, Grid.square(side), compression(k, p, s))
    assert plan.num_groups == math.ceil(math.ceil(num_frames / k) / s)
    assert plan.tokens_per_group == math.ceil(side / p) ** 2 == pooled_side(side, p) ** 2
    assert plan.num_tokens == plan.num_groups * plan.tokens_per_group
    assert plan.part == p
    assert plan.frame_group.dtype == np.int32
    assert plan.frame_group.shape == (num_frames,)
    for frame, group in enumerate(plan.frame_group.tolist()):
        before = frame // k
        assert group == (-1 if before % s else before // s)
    emitted = plan.frame_group[plan.frame_group >= 0]
    assert (np.diff(emitted) >= 0).all()
    assert sorted(set(emitted.tolist())) == list(range(plan.num_groups))


@repeatable
@given(st.integers(1, 30), pool_sizes, pool_sizes, pool_sizes)
def test_image_is_never_pooled_or_sampled(side, k, p, s):
    plan = plan_clip(1, Grid.square(side), compression(k, p, s))
    assert plan.frame_group.tolist() == [0]
    assert plan.num_groups == 1
    assert plan.num_tokens == side**2
    assert plan.part == 1  # that of tokens that are not pooled


@pytest.mark.parametrize("num_frames", [0, -1])
def test_a_clip_without_frames_is_rejected(num_frames):
    with pytest.raises(ValueError, match=f"num_frames={num_frames}"):
        plan_clip(num_frames, Grid.square(4), compression(1, 1, 1))


def place_clips(lengths, side, config):
    """Plans the clips that fit into a row; returns plan, first frame and first group slot of each."""
    placed, frame, group = [], 0, 0
    for length in lengths:
        plan = plan_clip(length, Grid.square(side), config)
        if frame + length <= FRAME_SLOTS and group + plan.num_groups <= GROUP_SLOTS:
            placed.append((plan, frame, group))
            frame, group = frame + length, group + plan.num_groups
    return placed


def visual_table(x, frame_group, p):
    """Pools a row's frames like the model, in the layout of the module docstring."""
    groups = temporal_pool(x[None], frame_group[None], GROUP_SLOTS)
    pooled = np.asarray(spatial_pool(groups, p)).reshape(-1, WIDTH)
    if p == 1:
        return pooled, pooled
    return np.concatenate([pooled, np.asarray(groups).reshape(-1, WIDTH)]), pooled


def expected_tokens(frames, side, k, p, s):
    """Returns the means [tokens, WIDTH] over the frames and cells that each token of a clip covers."""
    if len(frames) == 1:
        k = p = s = 1
    frames = frames.reshape(len(frames), side, side, WIDTH).astype(np.float64)
    return np.array(
        [
            frames[t : t + k, row : row + p, column : column + p].mean(axis=(0, 1, 2))
            for t in range(0, len(frames), k * s)
            for row in range(0, side, p)
            for column in range(0, side, p)
        ]
    )


@settings(repeatable, max_examples=60)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_visual_index_points_at_what_pooling_emits(lengths, side, k, p, s):
    x = np.random.default_rng(0).uniform(1, 2, (FRAME_SLOTS, side * side, WIDTH))
    x = x.astype(np.float32)
    placed = place_clips(lengths, side, compression(k, p, s))
    frame_group = np.full(FRAME_SLOTS, -1, np.int32)
    for plan, frame, group in placed:
        offset = np.where(plan.frame_group < 0, 0, group).astype(np.int32)
        frame_group[frame : frame + len(offset)] = plan.frame_group + offset
    table, pooled = visual_table(x, frame_group, p)

    used = []
    for plan, frame, group in placed:
        index = visual_index(plan, group, VisualShape(GROUP_SLOTS, (p,)), Grid.square(side))
        assert index.dtype == np.int32
        assert index.shape == (plan.num_tokens,)
        clip = x[frame : frame + len(plan.frame_group)]
        np.testing.assert_allclose(table[index], expected_tokens(clip, side, k, p, s), **TOLERANCE)
        used += index.tolist()
    assert len(set(used)) == len(used)
    assert min(used) >= 0
    assert max(used) < len(table)
    # All inputs are positive, so the slots that pooling filled are those above zero.
    emitted = sum(plan.num_groups for plan, _, _ in placed) * pooled_side(side, p) ** 2
    assert (pooled > 0).all(axis=-1).sum() == emitted


@repeatable
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True),
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4
    ),
    st.integers(2, 7),
    st.booleans(),
)
def test_clips_of_several_compressions_share_no_entry(pools, clips, side, halved):
    """Each part of the table has all group slots, so a clip's tokens are in the part of its factor."""
    grid = Grid(side, -(-side // 2) if halved else side)
    shape = VisualShape(GROUP_SLOTS, tuple(pools))
    parts, ends = shape.parts(grid), {}
    start = 0
    for part, tokens in parts.items():
        ends[part] = (start, start + GROUP_SLOTS * tokens**2)
        start = ends[part][1]
    used, group = [], 0
    for frames, k, which in clips:
        plan = plan_clip(frames, grid, compression(k, pools[which % len(pools)], 1))
        if group + plan.num_groups > GROUP_SLOTS:
            continue
        index = visual_index(plan, group, shape, grid)
        group += plan.num_groups
        first, end = ends[plan.part]
        assert first <= index.min() and index.max() < end
        assert parts[plan.part] == plan.side
        used += index.tolist()
    assert len(set(used)) == len(used)


@repeatable
@given(
    st.integers(1, 12),
    st.integers(2, 7),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "row", "group", "clip"]),
    st.integers(1, 3),
)
def test_newlines_and_a_smaller_grid_for_videos(frames, side, halved, image_newline, position, p):
    """The table's entries are numbered by hand: pooled tokens, then tokens of images, then the newline."""
    video = -(-side // 2) if halved else side
    grid = Grid(side, video, image_newline, position)
    plan = plan_clip(frames, grid, compression(3, p, 1))
    groups, first = plan.num_groups, 2
    pooled = pooled_side(video, p)
    apart = p > 1 or halved
    newline = GROUP_SLOTS * (pooled**2 + side**2 * apart)
    if frames == 1:
        start = GROUP_SLOTS * pooled**2 + first * side**2 if apart else first * side**2
        expected = [*range(start, start + side**2), *[newline] * image_newline]
    else:
        expected = []
        entry = first * pooled**2
        for _ in range(groups):
            for _ in range(pooled):
                expected += range(entry, entry + pooled)
                expected += [newline] * (position == "row")
                entry += pooled
            expected += [newline] * (position == "group")
        expected += [newline] * (position == "clip")
    index = visual_index(plan, first, VisualShape(GROUP_SLOTS, (p,)), grid)
    assert index.dtype == np.int32
    assert index.tolist() == expected
    assert plan.num_tokens == len(expected) == sum(plan.tokens_of_groups)
