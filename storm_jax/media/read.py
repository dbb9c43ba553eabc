"""Any medium to frames. Worker processes import this: it must stay light."""

from __future__ import annotations

import numpy as np

from storm_jax.config import FramesConfig
from storm_jax.media import frame_folder, video
from storm_jax.media import frames as frames_lib
from storm_jax.media.frames import Clip
from storm_jax.media.image import read_image
from storm_jax.media.media import Media


def read_media(medium: Media, num_frames: int, image_size: int, max_damage: float) -> Clip:
    """`num_frames` frames of a video file or of a folder of frames; an image is one frame.

    Raises:
      MediaError: when it cannot be read.
    """
    if medium.kind == "image":
        return Clip(read_image(medium, image_size)[None], np.zeros(1))
    if _is_folder(medium):
        return frame_folder.read_folder(medium, num_frames, image_size, max_damage)
    return video.read_video(medium, num_frames, image_size, max_damage)


def count_frames(medium: Media, num_frames: int, config: FramesConfig) -> int:
    """Frames that are taken of a medium; where that depends on its duration, its header is read.

    Raises:
      MediaError: when the header cannot be read.
    """
    if medium.kind == "image":
        return 1
    if not config.fps:
        return num_frames
    last = frame_folder.folder_duration(medium) if _is_folder(medium) else video.duration(medium)
    start, end = frames_lib.shown(medium, last)
    return frames_lib.count_frames(end - start, num_frames, config)


def _is_folder(medium: Media) -> bool:
    return medium.path is not None and medium.span is None and medium.path.is_dir()
