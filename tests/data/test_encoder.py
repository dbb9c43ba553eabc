"""Encoding of samples: one slot per visual token of the model, timestamps and captions, and planned
lengths that are upper bounds."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig, FramesConfig, LayoutConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.media.media import Media
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Caption, Sample, Turn


def sample(text: str = "<video>\nWhy?", *kinds: str, answer: str = "So.") -> Sample:
    media = tuple(Media(kind=kind, name=f"{i}.mp4") for i, kind in enumerate(kinds or ("video",)))
    return Sample(
        id="a", turns=(Turn("user", text), Turn("assistant", answer)), media=media, extra={}
    )


def encoder(tokenizer, style: str, compression: CompressionConfig, side: int = 2) -> SampleEncoder:
    text = ConversationEncoder(tokenizer, "")
    return SampleEncoder(
        text=text,
        grid=Grid.square(side),
        compression=compression,
        frames=FramesConfig(time_text=style),
    )


def test_per_group_text_is_the_time_of_the_first_frame(tokenizer):
    sample_encoder = encoder(
        tokenizer,
        "per_group",
        CompressionConfig(num_frames=8, temporal_pool=2, spatial_pool=1, temporal_sample=2),
    )
    encoded = sample_encoder.encode(sample(), [np.arange(8) * 1.5])
    text = tokenizer.decode(encoded.tokens)
    # Every second group of two frames is kept: those of frames 0 and 4.
    assert "0.0 s: " in text and "6.0 s: " in text and "3.0 s" not in text
    slots = np.flatnonzero(encoded.media == 0)
    assert len(slots) == 8 and (np.diff(slots) > 1).sum() == 1
    assert "0.0 s: " in tokenizer.decode(encoded.tokens[: slots[0]])
    assert not encoded.answer[: slots[-1]].any()


def test_a_sentence_lists_all_times(tokenizer):
    sample_encoder = encoder(tokenizer, "sentence", CompressionConfig(num_frames=4))
    text = tokenizer.decode(sample_encoder.encode(sample(), [np.array([0, 0.5, 1, 70.25])]).tokens)
    assert "lasts 70.2 s. Its 4 frames are at 0.0, 0.5, 1.0, 70.2 s.\n" in text


@pytest.mark.parametrize("style", ["none", "per_group"])
def test_captions_follow_the_groups_shown_up_to_their_time(tokenizer, style):
    """Groups of 2 frames start at 0, 2, 4 and 6 seconds."""
    captions = [
        Caption(0.0, "at once"),
        Caption(3.9, "third"),
        Caption(4.0, "fourth"),
        Caption(99, "end"),
    ]
    item = dataclasses.replace(sample(), captions=tuple(captions))
    sample_encoder = encoder(tokenizer, style, CompressionConfig(num_frames=8, temporal_pool=2))
    encoded = sample_encoder.encode(item, [np.arange(8.0)])
    marked = np.where(
        encoded.media == 0, tokenizer.encode("|", add_special_tokens=False)[0], encoded.tokens
    )
    groups = ["0.0 s: ||||", "2.0 s: ||||", "4.0 s: ||||", "6.0 s: ||||"]
    if style == "none":
        groups = ["||||"] * 4
    expected = f"{groups[0]}\nat once\n{groups[1]}\nthird\n{groups[2]}\nfourth\n{groups[3]}\nend\n"
    assert f"{expected}\nWhy?" in tokenizer.decode(marked)
    assert (encoded.media == 0).sum() == 16
    assert len(sample_encoder.plan(item, [8])) >= len(encoded)


def test_images_have_no_times(tokenizer):
    for style in ("none", "sentence", "per_group"):
        sample_encoder = encoder(tokenizer, style, CompressionConfig(num_frames=4))
        encoded = sample_encoder.encode(sample("<image>", "image"), [np.zeros(1)])
        assert " s" not in tokenizer.decode(encoded.tokens)
        assert (encoded.media == 0).sum() == 4


@hypothesis.given(
    style=st.sampled_from(["none", "sentence", "per_group"]),
    frames=st.integers(1, 40),
    pool=st.integers(1, 5),
    spatial=st.integers(1, 3),
    every=st.integers(1, 3),
    seconds=st.floats(0.0, 99_999),
)
@hypothesis.settings(max_examples=40)
def test_slots_match_the_models_tokens_and_plans_are_upper_bounds(
    tokenizer, style: str, frames: int, pool: int, spatial: int, every: int, seconds: float
):
    compression = CompressionConfig(
        num_frames=frames, temporal_pool=pool, spatial_pool=spatial, temporal_sample=every
    )
    sample_encoder = encoder(tokenizer, style, compression, side=3)
    item = sample("<image>\n<video>\nWhy?", "image", "video")
    times = [np.zeros(1), np.linspace(0, seconds, frames)]
    encoded, planned = sample_encoder.encode(item, times), sample_encoder.plan(item, [1, frames])
    assert (encoded.media == 1).sum() == plan_clip(frames, Grid.square(3), compression).num_tokens
    assert (encoded.media == 0).sum() == 9
    assert len(encoded) <= len(planned) and encoded.min_tokens <= planned.min_tokens
    if style == "none":
        np.testing.assert_array_equal(encoded.tokens, planned.tokens)


def test_a_truncated_answer_has_no_end_marker(tokenizer):
    sample_encoder = encoder(tokenizer, "none", CompressionConfig(num_frames=4))
    whole = sample_encoder.encode(sample(answer="so " * 30), [np.zeros(4)])
    assert whole.answer[-2] and not whole.answer[-1]  # the marker, and the template's line break
    truncated = whole.truncated(whole.min_tokens + 3)
    assert len(truncated) == whole.min_tokens + 3 and truncated.answer.sum() == 4
    np.testing.assert_array_equal(truncated.tokens, whole.tokens[: len(truncated)])
    assert tokenizer.eos_token_id not in truncated.tokens[truncated.answer]


@pytest.mark.parametrize("text", ["<video>\nWhy?", "Why? <video>"])
def test_min_tokens_cover_the_media_and_the_start_of_the_answer(tokenizer, text: str):
    sample_encoder = encoder(tokenizer, "none", CompressionConfig(num_frames=4))
    encoded = sample_encoder.encode(sample(text), [np.zeros(4)])
    shortest = encoded.truncated(encoded.min_tokens)
    assert shortest.answer.sum() == 1 and (shortest.media == 0).sum() == (encoded.media == 0).sum()


JOINED = LayoutConfig(
    before_video="Here are {frames} frames of {duration}.\n",
    group_time="\nFrame from {time}:",
    before_group="<|im_start|>",
    after_group="<|im_end|>",
    after_video="\n\n",
    joined=True,
)


def test_text_of_a_layout_is_tokenised_with_the_prompt_or_on_its_own(tokenizer):
    compression = CompressionConfig(num_frames=4, temporal_pool=2)
    item = sample("See <video>Why?")
    times = [np.array([0.0, 30.0, 60.0, 90.0])]
    joined = dataclasses.replace(encoder(tokenizer, "none", compression), layout=JOINED)
    tokens = joined.encode(item, times)
    visual = tokenizer.encode("<|endoftext|>", add_special_tokens=False) * 4
    mark = tokenizer.decode(visual)
    text = (
        "<|im_start|>user\nSee Here are four frames of 0:01:30.\n"
        f"\nFrame from 00:00:<|im_start|>{mark}<|im_end|>"
        f"\nFrame from 01:00:<|im_start|>{mark}<|im_end|>\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert tokens.tokens[: len(expected)].tolist() == expected
    alone = dataclasses.replace(joined, layout=LayoutConfig(after_group="\n"))
    found = alone.encode(sample("<video>\n\nWhy?"), times).tokens.tolist()
    newline = tokenizer.encode("\n", add_special_tokens=False)
    rest = tokenizer.encode("\n\nWhy?<|im_end|>", add_special_tokens=False)
    start = found.index(visual[0])
    assert found[start : start + 10 + len(rest)] == [*visual, *newline] * 2 + rest


@hypothesis.given(
    before=st.text("ab \n:0<", max_size=6),
    after=st.text("ab \n:0<", max_size=6),
    frames=st.integers(2, 12),
    seconds=st.floats(0.0, 99_999),
)
@hypothesis.settings(max_examples=60)
def test_the_plan_of_a_joined_layout_is_an_upper_bound(tokenizer, before, after, frames, seconds):
    compression = CompressionConfig(num_frames=frames, temporal_pool=2)
    joined = dataclasses.replace(encoder(tokenizer, "none", compression), layout=JOINED)
    item = sample(f"{before}<video>{after}")
    encoded = joined.encode(item, [np.linspace(0, seconds, frames)])
    planned = joined.plan(item, [frames])
    assert len(encoded) <= len(planned) and encoded.min_tokens <= planned.min_tokens


def test_the_newline_takes_slots(tokenizer):
    grid = Grid(3, 2, image_newline=True, video_newline="row")
    compression = CompressionConfig(num_frames=4, temporal_pool=2)
    item = sample("<image>\n<video>\nWhy?", "image", "video")
    sample_encoder = dataclasses.replace(encoder(tokenizer, "none", compression), grid=grid)
    encoded = sample_encoder.encode(item, [np.zeros(1), np.arange(4.0)])
    assert (encoded.media == 0).sum() == 9 + 1
    assert (encoded.media == 1).sum() == 2 * (4 + 2)
