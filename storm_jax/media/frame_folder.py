"""Folders of numbered images, read as videos."""

from __future__ import annotations

import pathlib
import re

import numpy as np

from storm_jax.media.frames import Clip, fill_damage, nearest_frames, sample_times
from storm_jax.media.image import IMAGE_SUFFIXES, read_image
from storm_jax.media.media import Media, MediaError


def read_folder(
    medium: Media,
    num_frames: int,
    image_size: int,
    max_damage: float = 0.0,
    out: np.ndarray | None = None,
) -> Clip:
    """Samples frames from a folder of images, ordered by the numbers in their names.

    Frames are `1 / medium.fps` seconds apart, by default one second.

    Args:
      out: uint8 [F, H, W, 3] to write the frames to.

    Raises:
      MediaError: the folder contains no image, or too many of the sampled ones are unreadable.
    """
    files = frame_files(medium)
    seconds = np.arange(len(files)) / (medium.fps or 1.0)
    picks = nearest_frames(seconds, sample_times(medium, float(seconds[-1]), num_frames))
    if out is None:
        out = np.empty((num_frames, image_size, image_size, 3), np.uint8)
    readable, problem = np.ones(num_frames, bool), ""
    for pick in np.unique(picks):
        try:
            out[picks == pick] = read_image(Media.file("image", files[pick]), image_size)
        except MediaError as error:
            readable[picks == pick] = False
            problem = problem or str(error)
    return fill_damage(medium, out, picks, seconds, readable, max_damage, "unreadable", problem)


def folder_duration(medium: Media) -> float:
    """Returns the seconds from the first to the last frame."""
    return (len(frame_files(medium)) - 1) / (medium.fps or 1.0)


def frame_files(medium: Media) -> list[pathlib.Path]:
    """Returns the images of a folder in numeric order: frame_10 comes after frame_9."""
    assert medium.path is not None
    try:
        files = [path for path in medium.path.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise MediaError.of(medium, error) from error
    if not files:
        raise MediaError(medium, "empty", "the folder contains no images")
    return sorted(files, key=lambda path: [
        int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)
    ])  # fmt: skip
