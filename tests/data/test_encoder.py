"""Protects what stands for a medium: as many slots as the model gives tokens, times that are told, and
lengths that are planned before they are known."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from storm_jax.compression import plan_clip
from storm_jax.config import CompressionConfig, FramesConfig
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
        text=text, side=side, compression=compression, frames=FramesConfig(time_text=style)
    )


def test_text_per_group_tells_the_time_of_its_first_frame(tokenizer):
    made = encoder(
        tokenizer,
        "per_group",
        CompressionConfig(num_frames=8, temporal_pool=2, spatial_pool=1, temporal_sample=2),
    )
    encoded = made.encode(sample(), [np.arange(8) * 1.5])
    text = tokenizer.decode(encoded.tokens)
    # Groups of two frames, and of these every second: those of frames 0 and 4.
    assert "0.0 s: " in text and "6.0 s: " in text and "3.0 s" not in text
    slots = np.flatnonzero(encoded.media == 0)
    assert len(slots) == 8 and (np.diff(slots) > 1).sum() == 1
    assert "0.0 s: " in tokenizer.decode(encoded.tokens[: slots[0]])
    assert not encoded.answer[: slots[-1]].any()


def test_a_sentence_tells_all_times(tokenizer):
    made = encoder(tokenizer, "sentence", CompressionConfig(num_frames=4))
    text = tokenizer.decode(made.encode(sample(), [np.array([0, 0.5, 1, 70.25])]).tokens)
    assert "lasts 70.2 s. Its 4 frames are at 0.0, 0.5, 1.0, 70.2 s.\n" in text


@pytest.mark.parametrize("style", ["none", "per_group"])
def test_captions_stand_behind_the_groups_that_are_shown_by_then(tokenizer, style):
    """Groups of 2 frames begin at 0, 2, 4 and 6 seconds."""
    said = [
        Caption(0.0, "at once"),
        Caption(3.9, "third"),
        Caption(4.0, "fourth"),
        Caption(99, "end"),
    ]
    item = dataclasses.replace(sample(), captions=tuple(said))
    made = encoder(tokenizer, style, CompressionConfig(num_frames=8, temporal_pool=2))
    encoded = made.encode(item, [np.arange(8.0)])
    marked = np.where(
        encoded.media == 0, tokenizer.encode("|", add_special_tokens=False)[0], encoded.tokens
    )
    groups = ["0.0 s: ||||", "2.0 s: ||||", "4.0 s: ||||", "6.0 s: ||||"]
    if style == "none":
        groups = ["||||"] * 4
    expected = f"{groups[0]}\nat once\n{groups[1]}\nthird\n{groups[2]}\nfourth\n{groups[3]}\nend\n"
    assert f"{expected}\nWhy?" in tokenizer.decode(marked)
    assert (encoded.media == 0).sum() == 16
    assert len(made.plan(item, [8])) >= len(encoded)


def test_images_have_no_times(tokenizer):
    for style in ("none", "sentence", "per_group"):
        made = encoder(tokenizer, style, CompressionConfig(num_frames=4))
        encoded = made.encode(sample("<image>", "image"), [np.zeros(1)])
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
@hypothesis.settings(max_examples=40, deadline=None)
def test_slots_are_the_models_tokens_and_plans_are_never_too_short(
    tokenizer, style: str, frames: int, pool: int, spatial: int, every: int, seconds: float
):
    compression = CompressionConfig(
        num_frames=frames, temporal_pool=pool, spatial_pool=spatial, temporal_sample=every
    )
    made = encoder(tokenizer, style, compression, side=3)
    item = sample("<image>\n<video>\nWhy?", "image", "video")
    times = [np.zeros(1), np.linspace(0, seconds, frames)]
    encoded, planned = made.encode(item, times), made.plan(item, [1, frames])
    assert (encoded.media == 1).sum() == plan_clip(frames, 3, compression).num_tokens
    assert (encoded.media == 0).sum() == 9
    assert len(encoded) <= len(planned) and encoded.min_tokens <= planned.min_tokens
    if style == "none":
        np.testing.assert_array_equal(encoded.tokens, planned.tokens)


def test_a_cut_answer_has_no_end_marker(tokenizer):
    made = encoder(tokenizer, "none", CompressionConfig(num_frames=4))
    whole = made.encode(sample(answer="so " * 30), [np.zeros(4)])
    assert whole.answer[-2] and not whole.answer[-1]  # the marker, and the template's line break
    cut = whole.truncated(whole.min_tokens + 3)
    assert len(cut) == whole.min_tokens + 3 and cut.answer.sum() == 4
    np.testing.assert_array_equal(cut.tokens, whole.tokens[: len(cut)])
    assert tokenizer.eos_token_id not in cut.tokens[cut.answer]


@pytest.mark.parametrize("text", ["<video>\nWhy?", "Why? <video>"])
def test_least_holds_the_media_and_the_start_of_the_answer(tokenizer, text: str):
    made = encoder(tokenizer, "none", CompressionConfig(num_frames=4))
    encoded = made.encode(sample(text), [np.zeros(4)])
    least = encoded.truncated(encoded.min_tokens)
    assert least.answer.sum() == 1 and (least.media == 0).sum() == (encoded.media == 0).sum()
