"""Frame sampling: how many, which and when; folders of frames; tolerated damage."""

from __future__ import annotations

import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from media_files import barcode, numbers
from PIL import Image

from storm_jax.config import FramesConfig
from storm_jax.media.frame_folder import read_folder
from storm_jax.media.frames import fill_damage, frames_at_rate, nearest_frames, sample_times
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import count_frames, read_media


@pytest.mark.parametrize(
    ("seconds", "fps", "count"),
    [
        (10.0, 1.0, 11),
        (10.0, 0.5, 6),
        (10.0, 2.0, 21),
        (31.0, 1.0, 32),
        (1000.0, 1.0, 32),  # capped: spread over the whole video
        (0.0, 1.0, 1),
        (0.3, 1.0, 1),
        (0.6, 1.0, 2),
    ],
)
def test_number_of_frames(seconds: float, fps: float, count: int):
    assert frames_at_rate(seconds, fps, 32) == count


@hypothesis.given(
    seconds=st.lists(st.floats(0, 1000), min_size=1, max_size=50, unique=True),
    count=st.integers(1, 40),
    fps=st.floats(0.1, 30),
)
def test_the_tail_is_never_dropped(seconds: list[float], count: int, fps: float):
    times = np.array(sorted(seconds))
    times -= times[0]
    chosen = frames_at_rate(times[-1], fps, count)
    assert 1 <= chosen <= count
    targets = sample_times(Media(kind="video", name="a"), times[-1], chosen)
    picks = nearest_frames(times, targets)
    assert len(picks) == chosen and (np.diff(picks) >= 0).all()
    assert picks[0] == 0 and (chosen == 1 or picks[-1] == len(times) - 1)
    best = np.abs(times[:, None] - targets).min(0)
    np.testing.assert_array_equal(np.abs(times[picks] - targets), best)
    if 1 < chosen < count:  # the requested rate, up to rounding to whole frames
        assert abs(targets[1] - 1 / fps) <= 0.5 / fps / (chosen - 1) + 1e-9


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Twelve frames whose names sort differently from their numbers."""
    for i in range(12):
        Image.fromarray(barcode(i)).save(tmp_path / f"frame_{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    return tmp_path


def medium(folder: pathlib.Path, **timing: float) -> Media:
    return Media(kind="video", name=str(folder), path=folder, **timing)


def test_a_folder_of_frames_is_a_video(folder: pathlib.Path):
    clip = read_media(medium(folder, fps=2.0), 4, 32, 0.0)
    assert numbers(clip.frames) == [0, 4, 7, 11]
    np.testing.assert_allclose(clip.times, [0, 2, 3.5, 5.5])
    part = read_media(medium(folder, fps=2.0, start=1.0, end=2.0), 3, 32, 0.0)
    assert numbers(part.frames) == [2, 3, 4]
    config = FramesConfig(fps=1.0)
    assert count_frames(medium(folder, fps=2.0), 32, config) == 7
    assert count_frames(medium(folder, fps=2.0, start=4.5), 32, config) == 2
    assert count_frames(Media(kind="image", name="a"), 32, config) == 1


def test_a_broken_frame_of_a_folder(folder: pathlib.Path):
    (folder / "frame_4.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"1 of 4 frames are unreadable: .*frame_4.png"):
        read_media(medium(folder), 4, 32, 0.0)
    clip = read_media(medium(folder), 4, 32, 0.25)
    assert numbers(clip.frames) == [0, 7, 7, 11] and clip.damaged == 1
    assert clip.times.tolist() == [0, 7, 7, 11]


def test_an_empty_folder_is_an_error(tmp_path: pathlib.Path):
    with pytest.raises(MediaError, match="contains no images"):
        read_folder(medium(tmp_path), 4, 32)


@hypothesis.given(
    readable=st.lists(st.booleans(), min_size=1, max_size=20),
    max_damage=st.sampled_from([0.0, 0.25, 0.9]),
)
def test_exactly_n_frames_or_an_error(readable: list[bool], max_damage: float):
    picks = np.arange(len(readable)) * 2
    frames = np.where(readable, picks, 255).astype(np.uint8).reshape(-1, 1, 1, 1)
    seconds = np.arange(2 * len(readable)) / 10.0
    arguments = (medium(pathlib.Path("a")), frames, picks, seconds, np.array(readable), max_damage)
    lost = readable.count(False)
    if lost > max_damage * len(readable) or not any(readable):
        with pytest.raises(
            MediaError, match=f"{lost} of {len(readable)} frames are unreadable: why"
        ):
            fill_damage(*arguments, "truncated", "why")
        return
    clip = fill_damage(*arguments, "truncated", "why")
    shown = clip.frames[:, 0, 0, 0].astype(int)
    assert len(shown) == len(picks) and clip.damaged == lost
    np.testing.assert_allclose(clip.times, shown / 10)
    for i in range(len(readable)):
        distance = min(abs(picks[i] - p) for p, good in zip(picks, readable, strict=True) if good)
        assert abs(shown[i] - picks[i]) == (0 if readable[i] else distance)
