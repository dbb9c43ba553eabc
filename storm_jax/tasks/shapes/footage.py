"""Real footage as background: crops of videos, with camera movement, shake and changes of light."""

from __future__ import annotations

import functools
import pathlib

import numpy as np
from PIL import Image

from storm_jax.media.frames import frames_at_rate
from storm_jax.media.media import Media
from storm_jax.media.video import duration, read_video
from storm_jax.tasks.shapes.settings import Settings

FORMATS = (".avi", ".mkv", ".mov", ".mp4", ".webm")
FPS = 25
SHORTEST, LONGEST = 1.0, 60.0  # seconds; later parts of a video are not used
TRAIN = 0.75  # of these frames, from the start; val and test show the others


def footage(settings: Settings, split: str, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Returns part of a video, uint8 [F, S, S, 3]; a clip that is longer than the video runs back and forth."""
    assert settings.footage is not None
    size = settings.size
    videos = read_footage(settings.footage, 2 * size)
    video = videos[rng.integers(len(videos))]
    cut = round(TRAIN * len(video))
    video = video[:cut] if split == "train" else video[cut:]
    start = rng.integers(max(1, len(video) - frames + 1))
    shown = video[_back_and_forth(start + np.arange(frames), len(video))]

    along = np.linspace(0, 1, frames)[:, None]
    side = rng.uniform(size, 1.7 * size)
    first, last = rng.uniform(0, 2 * size - side, (2, 2))
    shake = rng.normal(0, 0.02 * size, (frames, 2))
    corners = (first + along * (last - first) + shake).clip(0, 2 * size - side)  # [F, 2]
    before, after = rng.uniform(0.4, 0.9, 2)
    light = (before + along * (after - before))[..., None, None]  # [F, 1, 1, 1]
    crops = [_crop(frame, corner, side, size) for frame, corner in zip(shown, corners, strict=True)]
    return (np.stack(crops) * light).astype(np.uint8)


@functools.lru_cache
def read_footage(folder: str, size: int) -> tuple[np.ndarray, ...]:
    """Returns the frames of each video in a folder, uint8 [F, size, size, 3]; they stay in memory.

    Raises:
      ValueError: the folder has no videos, or one of them is too short or cannot be read.
    """
    if not pathlib.Path(folder).is_dir():
        raise ValueError(f"footage={folder!r} is not a folder")
    paths = sorted(p for p in pathlib.Path(folder).glob("[!.]*") if p.suffix.lower() in FORMATS)
    if not paths:
        raise ValueError(f"footage={folder!r} has no videos ({', '.join(FORMATS)})")
    return tuple(_read(path, size) for path in paths)


def _read(path: pathlib.Path, size: int) -> np.ndarray:
    medium = Media(kind="video", name=str(path), path=path.absolute(), end=LONGEST)
    seconds = duration(medium)
    if seconds < SHORTEST:
        raise ValueError(f"{path} has {seconds:.2f} s of footage, less than {SHORTEST:g} s")
    return read_video(medium, frames_at_rate(seconds, FPS, int(FPS * LONGEST)), size).frames


def _back_and_forth(indices: np.ndarray, length: int) -> np.ndarray:
    """Reflects indices at the last frame and at the first."""
    turned = indices % max(1, 2 * (length - 1))
    return np.minimum(turned, 2 * (length - 1) - turned)


def _crop(frame: np.ndarray, corner: np.ndarray, side: float, size: int) -> np.ndarray:
    """Returns a square of a frame, scaled to [size, size, 3]."""
    box = (*corner, *(corner + side))
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR, box))
