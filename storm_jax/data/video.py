"""Video files to frames and back, with PyAV.

`read_video` picks frames by time in one sequential pass: exact for constant and variable frame
rates, and every bad file, a cut one included, is one `VideoError`.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
from fractions import Fraction
from typing import Any

import av
import numpy as np

# Below this many pixels a frame decodes faster than threads wake up.
_SMALL = 128 * 128


class VideoError(ValueError):
    """A video that cannot be read; `cause` is "missing", "unreadable", "empty" or "truncated"."""

    def __init__(self, path: str | pathlib.Path, cause: str, message: str):
        super().__init__(f"video {path} is {cause}: {message}")
        self.path, self.cause = str(path), cause


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames uint8 [F, H, W, 3] and their times float64 [F] in seconds."""

    frames: np.ndarray
    times: np.ndarray


def read_video(path: str | pathlib.Path, num_frames: int, image_size: int) -> Clip:
    """Exactly `num_frames` frames, evenly spaced in time from the first frame to the last.

    The frame nearest to each time is taken, so short videos give duplicates. Frames are upright and
    resized (bicubic) to `image_size` x `image_size`, whatever their aspect, as SigLIP's preprocessing
    does.

    Raises:
      VideoError: for a missing, broken, empty or truncated file.
    """
    try:
        times, base = _frame_times(path)
        seconds = times * float(base)
        targets = np.linspace(seconds[0], seconds[-1], num_frames)
        after = np.searchsorted(seconds, targets).clip(1, len(seconds) - 1) if len(times) > 1 else 0
        before = after - 1 if len(times) > 1 else 0
        nearer = targets - seconds[before] <= seconds[after] - targets
        picks = np.where(nearer, before, after)
        frames = _decode(path, set(times[picks].tolist()), image_size)
    except (av.error.FileNotFoundError, FileNotFoundError) as error:
        raise VideoError(path, "missing", "no such file") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(path, "unreadable", str(error)) from error
    missing = [t for t in times[picks].tolist() if t not in frames]
    if missing:
        raise VideoError(path, "truncated", f"no frame at {float(missing[0] * base):.3f} s")
    return Clip(np.stack([frames[t] for t in times[picks].tolist()]), seconds[picks] - seconds[0])


def _open(path: str | pathlib.Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    if pathlib.Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
    container = av.open(str(path))
    if not container.streams.video:
        container.close()
        raise VideoError(path, "empty", "it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise VideoError(path, "unreadable", "its header is incomplete")
    # Frame threads hide a file that ends early; slice threads raise.
    stream.thread_type = "SLICE"
    if stream.width * stream.height <= _SMALL:
        stream.codec_context.thread_count = 1
    return container, stream


def _frame_times(path: str | pathlib.Path) -> tuple[np.ndarray, Fraction]:
    """Sorted timestamps of all frames in units of the returned time base, without decoding."""
    container, stream = _open(path)
    with container:
        packets = [packet for packet in container.demux(stream) if packet.size]
        # What was trimmed away without encoding again is still in the file, but not to be shown.
        stamps = [packet.pts for packet in packets if not packet.is_discard]
        shown_until = max(((p.pts or 0) + (p.duration or 0) for p in packets), default=0)
        if None in stamps:  # containers that store no presentation times
            container.seek(0)
            stamps = [frame.pts for frame in container.decode(stream)]
        # An MP4's index leaves out what was trimmed away; its header counts it.
        declared = len(stream.index_entries) if "mp4" in container.format.name else stream.frames
        end, base = _declared_end(stream), stream.time_base
    times = np.unique(np.array([stamp for stamp in stamps if stamp is not None], np.int64))
    if not len(times) or base is None:
        raise VideoError(path, "empty", "it has no frames")
    if declared > len(packets) + 1:  # some muxers count one frame more than they write
        raise VideoError(path, "truncated", f"it has {len(packets)} of {declared} frames")
    seconds = times * float(base)
    step = (seconds[-1] - seconds[0]) / max(1, len(times) - 1)
    last = max(seconds[-1], float(shown_until * base))
    if end is not None and last + 2 * step + 0.1 < end:
        raise VideoError(path, "truncated", f"it ends at {last:.2f} of {end:.2f} s")
    return times, base


def _declared_end(stream: av.VideoStream) -> float | None:
    """When the stream should end, in seconds, as Matroska notes it for each track."""
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except (KeyError, ValueError):
        return None


def _decode(path: str | pathlib.Path, wanted: set[int], size: int) -> dict[int, np.ndarray]:
    """Frames of the wanted timestamps, uint8 [size, size, 3]."""
    frames: dict[int, np.ndarray] = {}
    reformat = av.video.reformatter.VideoReformatter().reformat  # sets up the conversion once
    container, stream = _open(path)
    with container:
        for frame in container.decode(stream):
            if frame.pts in wanted:
                image = reformat(frame, size, size, "rgb24", interpolation="BICUBIC")
                frames[frame.pts] = _upright(image.to_ndarray(), frame)
            if len(frames) == len(wanted):
                break
    return frames


def _upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turns and mirrors a square image [S, S, 3] as the frame's display matrix says, by quarters."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist()
    if abs(b) > abs(a):
        image, flip_x, flip_y = image.swapaxes(0, 1), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def write_video(path: str | pathlib.Path, frames: np.ndarray, fps: int) -> None:
    """Writes uint8 [F, H, W, 3] as H.264 in MP4; the same frames give the same bytes.

    The file appears under its name only when it is complete.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(partial), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # mbtree makes the bytes of small videos differ from run to run.
            stream.options = {
                "crf": "12",
                "preset": "veryfast",
                "threads": "1",
                "x264-params": "mbtree=0",
            }
            stream.codec_context.flags |= av.codec.context.Flags.bitexact
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
