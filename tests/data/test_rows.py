"""The arrays of rows: samples of a row do not affect each other, and visual tokens index the groups of their
own clips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_by_hand import build_row, build_rows

from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.data.rows import (
    RowSample,
    RowShape,
    empty_rows,
)
from storm_jax.text.conversation import Encoded

PROPERTY = settings(max_examples=80, derandomize=True, database=None)
PAD, IMAGE = 1, 4  # pad id; side of a frame in pixels
TOKENS, FRAMES = 50, 12
LARGE = RowShape(
    tokens=TOKENS,
    frames=FRAMES,
    image_size=IMAGE,
    grid=Grid.square(2),
    compressions=(CompressionConfig(num_frames=4),),
)
SMALL = RowShape(
    tokens=TOKENS // 2,
    frames=FRAMES // 4,
    image_size=IMAGE,
    grid=Grid.square(2),
    compressions=(CompressionConfig(num_frames=4),),
)


def clip_tokens(shape: RowShape, frames: int) -> int:
    return plan_clip(frames, shape.grid, shape.compressions[0]).num_tokens


def make_sample(rng: np.random.Generator, shape: RowShape, lengths: list[int]) -> RowSample:
    """A sample with a clip of each length; text and frames are random, so all differ."""
    media: list[int] = [-1] * int(rng.integers(1, 4))
    for i, length in enumerate(lengths):
        media += [i] * clip_tokens(shape, length) + [-1] * int(rng.integers(0, 3))
    media += [-1] * int(rng.integers(1, 4))
    slots = np.array(media, np.int32)
    tokens = np.where(slots < 0, rng.integers(2, 1000, len(slots)), PAD).astype(np.int32)
    answer = (slots < 0) & (rng.random(len(slots)) < 0.5)
    answer[-1] = True
    clips = [rng.integers(1, 256, (length, IMAGE, IMAGE, 3)).astype(np.uint8) for length in lengths]
    return RowSample(Encoded(tokens, answer, slots), clips, shape.compressions[0])


@st.composite
def packed(draw) -> tuple[RowShape, list[RowSample]]:
    """A row's shape and samples that fit it, some of them without media."""
    compression = CompressionConfig(
        num_frames=draw(st.integers(1, 8)),
        temporal_pool=draw(st.integers(1, 4)),
        spatial_pool=draw(st.integers(1, 3)),
        temporal_sample=draw(st.integers(1, 3)),
    )
    shape = RowShape(
        tokens=120,
        frames=20,
        image_size=IMAGE,
        grid=Grid.square(draw(st.integers(1, 4))),
        compressions=(compression,),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    clip = st.sampled_from([1, compression.num_frames])
    samples, tokens, frames = [], 0, 0
    for lengths in draw(st.lists(st.lists(clip, max_size=3), min_size=1, max_size=8)):
        sample = make_sample(rng, shape, lengths)
        if tokens + len(sample.encoded) <= shape.tokens and frames + sum(lengths) <= shape.frames:
            samples.append(sample)
            tokens, frames = tokens + len(sample.encoded), frames + sum(lengths)
    return shape, samples


def table(shape: RowShape) -> tuple[int, int, int]:
    """Group slots, and visual tokens of a pooled and of an unpooled group."""
    side = -(-shape.grid.image // shape.compressions[0].spatial_pool)
    return shape.visual.num_groups, side * side, shape.grid.image * shape.grid.image


@PROPERTY
@given(packed())
def test_each_sample_is_unchanged_in_its_own_segment(case):
    shape, samples = case
    row = build_row(samples, PAD, shape)
    end = 0
    for number, sample in enumerate(samples, start=1):
        here = slice(end, end + len(sample.encoded))
        end = here.stop
        assert (row["segment_ids"][here] == number).all()
        np.testing.assert_array_equal(row["tokens"][here], sample.encoded.tokens)
        np.testing.assert_array_equal(row["positions"][here], np.arange(len(sample.encoded)))
    assert (row["segment_ids"][end:] == 0).all() and (row["positions"][end:] == 0).all()
    assert (row["tokens"][end:] == PAD).all()


@PROPERTY
@given(packed())
def test_targets_are_the_next_token_of_the_same_sample_only(case):
    shape, samples = case
    row = build_row(samples, PAD, shape)
    segments = row["segment_ids"]
    inside = (segments[:-1] == segments[1:]) & (segments[:-1] > 0)
    np.testing.assert_array_equal(row["targets"][:-1][inside], row["tokens"][1:][inside])
    outside = np.append(~inside, True)
    assert (row["targets"][outside] == PAD).all()
    assert (row["loss_weights"][outside] == 0).all()


@PROPERTY
@given(packed())
def test_loss_covers_targets_that_are_answer_tokens(case):
    shape, samples = case
    row = build_row(samples, PAD, shape)
    expected = [np.append(sample.encoded.answer[1:], False) for sample in samples]
    expected = np.concatenate([*expected, np.zeros(shape.tokens, bool)])[: shape.tokens]
    np.testing.assert_array_equal(row["loss_weights"], expected.astype(np.float32))
    assert (row["visual_index"][1:][row["loss_weights"][:-1] > 0] < 0).all()


@PROPERTY
@given(packed())
def test_frames_are_in_order_with_the_id_of_their_clip(case):
    shape, samples = case
    row = build_row(samples, PAD, shape)
    clips = [clip for sample in samples for clip in sample.clips]
    ids = [number for number, clip in enumerate(clips, start=1) for _ in clip]
    padding = shape.frames - len(ids)
    assert row["frame_clip"].tolist() == ids + [0] * padding
    assert (row["frame_group"][len(ids) :] == -1).all() and (row["frames"][len(ids) :] == 0).all()
    if clips:
        np.testing.assert_array_equal(row["frames"][: len(ids)], np.concatenate(clips))


@PROPERTY
@given(packed())
def test_groups_of_a_row_are_the_emitted_groups_of_each_clip(case):
    shape, samples = case
    row = build_row(samples, PAD, shape)
    k, s = shape.compressions[0].temporal_pool, shape.compressions[0].temporal_sample
    expected, next_group = [], 0
    for clip in (clip for sample in samples for clip in sample.clips):
        kept = [0] if len(clip) == 1 else range(0, -(-len(clip) // k), s)
        slots = {group: next_group + i for i, group in enumerate(kept)}
        expected += [slots.get(t // k, -1) for t in range(len(clip))]
        next_group += len(slots)
    assert row["frame_group"][: len(expected)].tolist() == expected
    assert next_group <= shape.visual.num_groups


@PROPERTY
@given(packed())
def test_visual_slots_match_the_plan_and_index_their_own_groups(case):
    shape, samples = case
    row = build_row(samples, PAD, shape)
    groups, pooled, unpooled = table(shape)
    is_unpooled = shape.compressions[0].spatial_pool > 1
    size = groups * pooled + (groups * unpooled if is_unpooled else 0)
    visual = row["visual_index"]
    assert (visual >= -1).all() and (visual < size).all()
    used = visual[visual >= 0]
    assert len(set(used.tolist())) == len(used)
    clip, end = 0, 0
    for sample in samples:
        here = visual[end : end + len(sample.encoded)]
        end += len(sample.encoded)
        np.testing.assert_array_equal(here >= 0, sample.encoded.media >= 0)
        for medium, frames in enumerate(sample.clips):
            clip += 1
            index = here[sample.encoded.media == medium]
            assert len(index) == clip_tokens(shape, len(frames))
            of_clip = row["frame_group"][row["frame_clip"] == clip]
            emitted = sorted(set(of_clip.tolist()) - {-1})
            if len(frames) == 1 and is_unpooled:
                begin, width = groups * pooled, unpooled
            else:
                begin, width = 0, pooled
            places = [begin + group * width + i for group in emitted for i in range(width)]
            assert index.tolist() == places
    assert (visual[end:] == -1).all()


@pytest.mark.parametrize(("spatial_pool", "first"), [(1, 0), (2, 5 * 4)])
def test_image_indexes_the_unpooled_part_when_space_is_pooled(spatial_pool: int, first: int):
    """Side 3 is 9 tokens, or 4 if pooled by 2; a row of 20 tokens then has 5 group slots."""
    compression = CompressionConfig(num_frames=4, spatial_pool=spatial_pool)
    shape = RowShape(
        tokens=20, frames=5, image_size=IMAGE, grid=Grid.square(3), compressions=(compression,)
    )
    sample = make_sample(np.random.default_rng(0), shape, [1])
    row = build_row([sample], PAD, shape)
    visual = row["visual_index"]
    assert visual[visual >= 0].tolist() == list(range(first, first + 9))
    assert row["frame_group"].tolist() == [0, -1, -1, -1, -1]


@pytest.mark.parametrize(
    ("tokens", "frames", "side", "pool", "groups"),
    [
        (50, 12, 2, 1, 12),
        (50, 12, 4, 1, 3),
        (50, 12, 4, 2, 12),
        (50, 12, 3, 2, 12),
        (5, 9, 9, 1, 1),
    ],
)
def test_group_slots_are_bounded_by_frames_and_tokens(
    tokens: int, frames: int, side: int, pool: int, groups: int
):
    shape = RowShape(
        tokens=tokens,
        frames=frames,
        image_size=IMAGE,
        grid=Grid.square(side),
        compressions=(CompressionConfig(num_frames=4, spatial_pool=pool),),
    )
    assert shape.visual.num_groups == groups


# Samples that failed to decode.


@PROPERTY
@given(packed(), st.data())
def test_failed_sample_leaves_no_trace(case, data):
    shape, samples = case
    failed = data.draw(st.lists(st.booleans(), min_size=len(samples), max_size=len(samples)))
    kept = [sample for sample, gone in zip(samples, failed, strict=True) if not gone]
    with_gaps = [None if gone else sample for sample, gone in zip(samples, failed, strict=True)]
    got, expected = build_row(with_gaps, PAD, shape), build_row(kept, PAD, shape)
    numbers = np.array([0, *np.flatnonzero(~np.array(failed, bool)) + 1])
    expected["segment_ids"] = numbers[expected["segment_ids"]]
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_row_of_failed_samples_is_padding():
    shape = RowShape(
        tokens=20,
        frames=5,
        image_size=IMAGE,
        grid=Grid.square(3),
        compressions=(CompressionConfig(num_frames=4),),
    )
    got, expected = build_row([None, None], PAD, shape), build_row([], PAD, shape)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    assert (got["tokens"] == PAD).all() and not got["loss_weights"].any()
    assert (got["visual_index"] == -1).all() and not got["frame_clip"].any()


def test_arrays_have_their_documented_shapes_and_types():
    shape = RowShape(
        tokens=20,
        frames=5,
        image_size=IMAGE,
        grid=Grid.square(3),
        compressions=(CompressionConfig(num_frames=4),),
    )
    batch = empty_rows(3, PAD, shape)
    expected = dict.fromkeys(
        ("tokens", "targets", "positions", "segment_ids", "visual_index"), ((3, 20), np.int32)
    )
    expected["loss_weights"] = ((3, 20), np.float32)
    expected["frames"] = ((3, 5, IMAGE, IMAGE, 3), np.uint8)
    expected |= dict.fromkeys(("frame_clip", "frame_group"), ((3, 5), np.int32))
    assert {name: (array.shape, array.dtype.type) for name, array in batch.items()} == expected


def test_rows_of_a_batch_are_independent():
    shape = RowShape(
        tokens=20,
        frames=5,
        image_size=IMAGE,
        grid=Grid.square(3),
        compressions=(CompressionConfig(num_frames=4),),
    )
    rng = np.random.default_rng(0)
    samples = [[make_sample(rng, shape, [])] for _ in range(2)]
    batch = build_rows(samples, PAD, shape)
    single = [build_row(members, PAD, shape) for members in samples]
    for name, array in batch.items():
        for i in range(2):
            np.testing.assert_array_equal(array[i], single[i][name])
