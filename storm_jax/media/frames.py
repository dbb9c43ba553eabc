"""Which frames of a video are taken, and when they are shown; folders of frames.

frames of a video = spread over [start, end] in time, nearest frame to each
how many          = compression.num_frames, or data.frames.fps times the duration where that is less
"""

from __future__ import annotations

import dataclasses

import numpy as np

from storm_jax.config import FramesConfig
from storm_jax.media.media import Media, MediaError


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of one medium.

    Attributes:
      frames: uint8 [F, H, W, 3].
      times: float64 [F], seconds from the first frame of the video.
      damaged: how many of them stand in for one that could not be read.
    """

    frames: np.ndarray
    times: np.ndarray
    damaged: int = 0


def count_frames(duration: float, num_frames: int, config: FramesConfig) -> int:
    """Frames taken of `duration` seconds of video: one every 1/fps seconds, the first and the last
    included, at most `num_frames`, which are then spread over the whole. An fps of 0 is always
    `num_frames`."""
    if not config.fps:
        return num_frames
    return max(1, min(num_frames, round(duration * config.fps) + 1))


def shown(medium: Media, last: float) -> tuple[float, float]:
    """The seconds of a video that are shown, of one whose last frame is at `last`.

    Raises:
      MediaError: when it ends before they start.
    """
    if medium.start > last + 1e-3:
        raise MediaError(
            medium, "truncated", f"it ends at {last:.2f} s, before start={medium.start:g}"
        )
    return min(medium.start, last), last if medium.end is None else min(medium.end, last)


def spread(medium: Media, last: float, num_frames: int) -> np.ndarray:
    """The times of `num_frames` frames, float64 [num_frames], of a video whose last is at `last`."""
    return np.linspace(*shown(medium, last), num_frames)


def nearest(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the frame nearest to each of `times`, the earlier of two; `seconds` is sorted."""
    if len(seconds) == 1:
        return np.zeros(len(times), np.int64)
    after = np.searchsorted(seconds, times).clip(1, len(seconds) - 1)
    before = after - 1
    return np.where(times - seconds[before] <= seconds[after] - times, before, after)


def fill_damage(
    medium: Media,
    frames: np.ndarray,
    picks: np.ndarray,
    seconds: np.ndarray,
    readable: np.ndarray,
    max_damage: float,
    cause: str,
    problem: str,
) -> Clip:
    """The clip of the picked frames, with the nearest readable one where one is not.

    Args:
      frames: uint8 [F, H, W, 3]; what is not readable is overwritten.
      picks: int [F], their numbers, sorted.
      seconds: float [n], when each number is shown.
      readable: bool [F].

    Raises:
      MediaError: with `cause` when more than `max_damage` of them are not.
    """
    damaged = int((~readable).sum())
    if damaged > max_damage * len(picks) or not readable.any():
        raise MediaError(medium, cause, f"{damaged} of {len(picks)} frames are lost: {problem}")
    good = np.flatnonzero(readable)
    taken = np.arange(len(picks))
    for i in np.flatnonzero(~readable):
        taken[i] = good[np.abs(picks[good] - picks[i]).argmin()]
        frames[i] = frames[taken[i]]
    return Clip(frames, seconds[picks[taken]], damaged)
