"""Reads any medium into frames. Worker processes import this module, so it must stay light."""

from __future__ import annotations

import numpy as np

from storm_jax.config import FramesConfig
from storm_jax.media import frame_folder, video
from storm_jax.media import frames as frames_lib
from storm_jax.media.frames import Clip
from storm_jax.media.image import image_header, read_image
from storm_jax.media.media import Header, Media


def read_media(
    medium: Media,
    num_frames: int,
    image_size: int,
    max_damage: float,
    out: np.ndarray | None = None,
) -> Clip:
    """Reads `num_frames` frames of a video file or a folder of frames, or the one frame of an image.

    Args:
      out: uint8 [F, H, W, 3] to write the frames to.

    Raises:
      MediaError: the medium cannot be read.
    """
    if medium.kind == "image":
        image = read_image(medium, image_size)
        if out is None:
            return Clip(image[None], np.zeros(1))
        out[0] = image
        return Clip(out, np.zeros(1))
    read = frame_folder.read_folder if medium.is_folder() else video.read_video
    return read(medium, num_frames, image_size, max_damage, out)


def fill_from(medium: Media, max_damage: float, out: np.ndarray) -> tuple[np.ndarray, int]:
    """Reads a medium into `out` [F, H, W, 3]; returns `times` and `damaged` of its clip."""
    num_frames, image_size = out.shape[:2]
    clip = read_media(medium, num_frames, image_size, max_damage, out)
    return clip.times, clip.damaged


def read_header(medium: Media) -> Header:
    """Reads the size and length of an image or a video file.

    Raises:
      MediaError: the medium cannot be read.
    """
    return image_header(medium) if medium.kind == "image" else video.video_header(medium)


def count_frames(medium: Media, num_frames: int, config: FramesConfig) -> int:
    """Returns the number of frames to sample. Reads the file's header if it depends on the duration.

    Raises:
      MediaError: the header cannot be read.
    """
    if medium.kind == "image":
        return 1
    if medium.nframes:
        return min(medium.nframes, num_frames)
    is_folder = medium.is_folder()
    fps = config.fps if is_folder else medium.fps or config.fps
    if not fps:
        return num_frames
    last = frame_folder.folder_duration(medium) if is_folder else video.duration(medium)
    start, end = frames_lib.clip_bounds(medium, last)
    return frames_lib.frames_at_rate(end - start, fps, num_frames)
