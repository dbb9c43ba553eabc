"""Frame sampling: which frames of a video are used, and their timestamps.

Frames are evenly spaced in time over [start, end]; the nearest frame to each time is used. Their number
is compression.num_frames, or fewer if the record's `nframes` says so, or if a rate (the record's `fps`, or
data.frames.fps) times the duration is less.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from storm_jax.media.media import Media, MediaError


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of one medium.

    Attributes:
      frames: uint8 [F, H, W, 3].
      times: float64 [F], seconds from the first frame of the video.
      damaged: number of unreadable frames that were replaced by a neighbour.
    """

    frames: np.ndarray
    times: np.ndarray
    damaged: int = 0


def frames_at_rate(duration: float, fps: float, limit: int) -> int:
    """Returns the number of frames to sample from `duration` seconds of video, at most `limit`.

    One frame every 1/fps seconds, including the first and the last frame.
    """
    return max(1, min(limit, round(duration * fps) + 1))


def clip_bounds(medium: Media, last: float) -> tuple[float, float]:
    """Returns (start, end) in seconds of the part of a video to use; its last frame is at `last`.

    Raises:
      MediaError: the video ends before `medium.start`.
    """
    if medium.start > last + 1e-3:
        raise MediaError(
            medium, "truncated", f"the video ends at {last:.2f} s, before start={medium.start:g}"
        )
    return min(medium.start, last), last if medium.end is None else min(medium.end, last)


def sample_times(medium: Media, last: float, num_frames: int) -> np.ndarray:
    """Returns `num_frames` evenly spaced times, float64 [num_frames]; the video's last frame is at `last`."""
    return np.linspace(*clip_bounds(medium, last), num_frames)


def nearest_frames(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns the index of the frame nearest to each of `times`, the earlier one in a tie.

    `seconds` are the sorted timestamps of all frames.
    """
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
    """Returns the sampled frames as a clip, with unreadable ones replaced by the nearest readable one.

    Args:
      frames: uint8 [F, H, W, 3]; unreadable entries are overwritten in place.
      picks: int [F], sorted frame numbers.
      seconds: float [n], timestamp of every frame number.
      readable: bool [F].
      max_damage: largest fraction of unreadable frames that is tolerated.

    Raises:
      MediaError: with `cause`, if a larger fraction, or every frame, is unreadable.
    """
    damaged = int((~readable).sum())
    if damaged > max_damage * len(picks) or not readable.any():
        raise MediaError(
            medium, cause, f"{damaged} of {len(picks)} frames are unreadable: {problem}"
        )
    good = np.flatnonzero(readable)
    taken = np.arange(len(picks))
    for i in np.flatnonzero(~readable):
        taken[i] = good[np.abs(picks[good] - picks[i]).argmin()]
        frames[i] = frames[taken[i]]
    return Clip(frames, seconds[picks[taken]], damaged)
