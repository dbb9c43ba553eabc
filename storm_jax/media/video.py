"""Video files to frames and back, with PyAV.

`read_video` finds the times of all frames without decoding, picks by time, and decodes the groups of
pictures that hold what was picked: exact for constant and variable frame rates. Every bad file, a cut
one included, is one `MediaError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

from storm_jax.media.frames import Clip, fill_damage, nearest, spread
from storm_jax.media.media import Media, MediaError

# A header that asks for larger frames than 16k x 8k is damaged, or meant to exhaust memory.
MAX_PIXELS = 2**27
# Containers whose index leads to any keyframe; others are read from their start.
_SEEKABLE = ("mp4", "matroska")
# Jumping to a keyframe costs about as much as decoding this many frames.
_JUMP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Timeline:
    """When a video's frames are shown.

    Attributes:
      stamps: int64 [n], sorted, in units of `base` seconds.
      keyframes: those of keyframes, sorted; empty where decoding must begin at the start.
      numbered: whether frames are known by their number in order of display, not by their own
        timestamps, which the container lacks.
      last: when the last frame should be shown, in seconds.
      damage: why the file holds less than it should; "" = it is whole.
    """

    stamps: np.ndarray
    base: Fraction
    keyframes: np.ndarray
    numbered: bool
    last: float
    damage: str

    @functools.cached_property
    def seconds(self) -> np.ndarray:
        return self.stamps * float(self.base)

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """Numbers of frames by their timestamps."""
        return {stamp: number for number, stamp in enumerate(self.stamps.tolist())}


def read_video(medium: Media, num_frames: int, image_size: int, max_damage: float = 0.0) -> Clip:
    """Exactly `num_frames` frames, evenly spaced in time over the part of the video that is shown.

    The frame nearest to each time is taken, so short videos give duplicates. Frames are upright and
    resized (bicubic) to `image_size` x `image_size`, whatever their aspect, as SigLIP's preprocessing
    does. Up to `max_damage` of the frames may be unreadable: the nearest readable one stands in.

    Raises:
      MediaError: for a missing, broken, empty or truncated file, or one that ends before `start`.
    """
    with _reading(medium), _opened(medium) as video:
        timeline = _read_timeline(video)
        if timeline.damage and not max_damage:
            raise MediaError(medium, "truncated", timeline.damage)
        seconds = timeline.seconds - timeline.seconds[0]
        last = timeline.last - float(timeline.seconds[0])
        times = spread(medium, last, num_frames)
        picks = nearest(seconds, times)
        step = seconds[-1] / max(1, len(seconds) - 1)
        lost = times > seconds[-1] + step + 0.1
        found = _Frames(picks, image_size)
        errors = _decode(video, timeline, found)
    cause = "unreadable" if errors else "truncated"
    readable = np.isin(picks, list(found.numbers)) & ~lost
    problem = [*errors, timeline.damage or "it has no such frames"][0]
    return fill_damage(medium, found.frames, picks, seconds, readable, max_damage, cause, problem)


def duration(medium: Media) -> float:
    """Seconds from the first to about the last frame, from the header where it says so.

    Raises:
      MediaError: as `read_video`.
    """
    with _reading(medium), _opened(medium) as video:
        if video.stream.duration and video.stream.time_base:
            return float(video.stream.duration * video.stream.time_base)
        if video.container.duration:
            return video.container.duration / av.time_base
        timeline = _read_timeline(video)
        return timeline.last - float(timeline.seconds[0])


@contextlib.contextmanager
def _reading(medium: Media) -> Iterator[None]:
    """Whatever is raised for a bad file, as a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(medium, "missing", "no such file") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(medium, "unreadable", _told(error)) from error


def _told(error: Exception) -> str:
    """What an error says, without the number and the file that FFmpeg's errors have around it."""
    return getattr(error, "strerror", None) or str(error)


@dataclasses.dataclass
class _Video:
    """An open file and its first video stream."""

    medium: Media
    container: av.container.InputContainer
    stream: av.VideoStream

    @property
    def is_seekable(self) -> bool:
        return any(name in self.container.format.name for name in _SEEKABLE)

    @property
    def is_avi(self) -> bool:
        return self.container.format.name == "avi"


@contextlib.contextmanager
def _opened(medium: Media) -> Iterator[_Video]:
    video = _Video(medium, *_open(medium))
    try:
        yield video
    finally:
        video.container.close()


def _open(medium: Media) -> tuple[av.container.InputContainer, av.VideoStream]:
    container = av.open(medium.open(), "r")
    try:
        if not container.streams.video:
            raise MediaError(medium, "empty", "it has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError(medium, "unreadable", "its header is incomplete")
        if stream.width * stream.height > MAX_PIXELS:
            size = f"{stream.width} x {stream.height}"
            raise MediaError(medium, "unreadable", f"frames of {size} pixels")
    except MediaError:
        container.close()
        raise
    # Files are decoded beside each other; and frame threads would hide one that ends early.
    stream.codec_context.thread_count = 1
    # A damaged frame is an error, not something that looks like a frame.
    stream.codec_context.options = {"err_detect": "explode"}
    return container, stream


def _read_timeline(video: _Video) -> _Timeline:
    medium, stream = video.medium, video.stream
    damage = ""
    packets: list[av.Packet] = []
    try:
        packets += (packet for packet in video.container.demux(stream) if packet.size)
    except av.error.FFmpegError as error:
        damage = _told(error)
    if not packets:
        raise MediaError(medium, "empty", "it has no frames")
    base, end = stream.time_base, _declared_end(stream)
    # An MP4's index leaves out what was trimmed away; its header counts it.
    is_mp4 = "mp4" in video.container.format.name
    declared = len(stream.index_entries) if is_mp4 else stream.frames
    # What was trimmed away without encoding again is still in the file, but not to be shown.
    stamps: Sequence[int | None] = [packet.pts for packet in packets if not packet.is_discard]
    numbered = video.is_avi or None in stamps  # AVI knows only the order of decoding
    if numbered:
        base = base if video.is_avi and base else 1 / (stream.average_rate or Fraction(25))
        decoded = {packet.dts for packet in packets if packet.dts is not None}
        stamps = sorted(decoded) if len(decoded) == len(packets) else list(range(len(packets)))
    times = np.unique(np.array(stamps, np.int64))
    if not len(times) or base is None:
        raise MediaError(medium, "empty", "it has no frames")
    keys = [packet.pts for packet in packets if packet.is_keyframe and not numbered]
    seconds = times * float(base)
    step = (seconds[-1] - seconds[0]) / max(1, len(times) - 1)
    last = seconds[-1]
    shown_until = max(((p.pts or 0) + (p.duration or 0) for p in packets), default=0)
    if declared > len(packets) + 1:  # some muxers count one frame more than they write
        damage = damage or f"it has {len(packets)} of {declared} frames"
        last = seconds[0] + step * (declared - 1)
    if end is not None and max(last, float(shown_until * base)) + 2 * step + 0.1 < end:
        damage = damage or f"it ends at {last:.2f} of {end:.2f} s"
        last = end - step
    keyframes = np.unique(np.array(keys if video.is_seekable else [], np.int64))
    return _Timeline(
        stamps=times,
        base=base,
        keyframes=keyframes,
        numbered=numbered,
        last=float(last),
        damage=damage,
    )


def _declared_end(stream: av.VideoStream) -> float | None:
    """When the stream should end, in seconds, as Matroska notes it for each track."""
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except (KeyError, ValueError):
        return None


class _Frames:
    """Room for the frames of the picked numbers, a number once or more; what was found of them."""

    def __init__(self, picks: np.ndarray, size: int):
        self.picks, self.size = picks, size
        self.frames = np.empty((len(picks), size, size, 3), np.uint8)
        self.numbers: set[int] = set()
        self._reformat = av.video.reformatter.VideoReformatter().reformat  # set up once

    def put(self, number: int, frame: av.VideoFrame) -> None:
        image = self._reformat(frame, self.size, self.size, "rgb24", interpolation="BICUBIC")
        first, last = np.searchsorted(self.picks, [number, number + 1])
        self.frames[first:last] = _upright(image.to_ndarray(), frame)
        self.numbers.add(number)


def _decode(video: _Video, timeline: _Timeline, found: _Frames) -> list[str]:
    """Decodes the frames of the picked numbers; returns the errors that left some out."""
    errors: list[str] = []

    def take(start: int | None, wanted: set[int]) -> None:
        if start is None:  # only from the beginning, which such files have to be opened again for
            video.container.close()
            video.container, video.stream = _open(video.medium)
        else:
            video.container.seek(start, stream=video.stream)
        for number, frame in _numbered(_readable(video, start, errors), timeline):
            if number in wanted and not frame.is_corrupt:
                found.put(number, frame)
                wanted.discard(number)
            if not wanted or number > max(wanted):
                return

    picks = np.unique(found.picks)
    jumps = list(_jumps(timeline, picks))
    for start, members in jumps:
        take(start, set(members))
    missing = set(picks.tolist()) - found.numbers
    if missing and any(start is not None for start, _ in jumps):
        # An index that leads elsewhere, or frames behind a keyframe that build on earlier ones.
        errors.clear()
        take(None, missing)
    return errors


def _readable(video: _Video, start: int | None, errors: list[str]) -> Iterator[av.VideoFrame]:
    """Frames from the keyframe at `start` on, in order of display. After an error the next is that of
    another keyframe: those between may build on what is lost."""
    lost = False
    try:
        for packet in video.container.demux(video.stream):
            # Behind a keyframe may come frames that are shown before it and build on earlier ones.
            is_early = start is not None and packet.pts is not None and packet.pts < start
            if is_early or (lost and packet.size and not packet.is_keyframe):
                continue
            lost = False
            try:
                yield from packet.decode()
            except av.error.FFmpegError as error:
                errors.append(_told(error))
                video.stream.codec_context.flush_buffers()
                lost = True
    except av.error.FFmpegError as error:
        errors.append(_told(error))


def _jumps(timeline: _Timeline, picks: np.ndarray) -> Iterator[tuple[int | None, list[int]]]:
    """The keyframes to jump to and the picks to decode from each; None = read on from the start."""
    if not len(timeline.keyframes):
        yield None, picks.tolist()
        return
    stamps = timeline.stamps
    members: list[int] = []
    start: int | None = None
    for pick in picks.tolist():
        before = np.searchsorted(timeline.keyframes, stamps[pick], side="right") - 1
        keyframe = int(timeline.keyframes[max(0, before)])
        at = int(np.searchsorted(stamps, keyframe))
        if members and at > members[-1] + _JUMP:
            yield start, members
            members = []
        if not members:
            start = keyframe
        members.append(pick)
    yield start, members


def _numbered(
    frames: Iterator[av.VideoFrame], timeline: _Timeline
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their numbers in order of display."""
    if timeline.numbered:
        yield from enumerate(frames)
        return
    for frame in frames:
        if frame.pts in timeline.numbers:
            yield timeline.numbers[frame.pts], frame


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
