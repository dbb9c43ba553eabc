"""Reads any medium into frames. Worker processes import this module, so it must stay light."""

from __future__ import annotations

import numpy as np

from storm_jax.config import FramesConfig
from storm_jax.media import frame_folder, video
from storm_jax.media import frames as frames_lib
from storm_jax.media.frames import Clip
from storm_jax.media.image import read_image
from storm_jax.media.media import Media


def read_media(medium: Media, num_frames: int, image_size: int, max_damage: float) -> Clip:
    """Reads `num_frames` frames of a video file or a folder of frames, or the one frame of an image.

    Raises:
      MediaError: the medium cannot be read.
    """
    if medium.kind == "image":
        return Clip(read_image(medium, image_size)[None], np.zeros(1))
    if medium.is_folder():
        return frame_folder.read_folder(medium, num_frames, image_size, max_damage)
    return video.read_video(medium, num_frames, image_size, max_damage)


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
