"""Video files to frames and back, with PyAV.

`read_video` reads all timestamps without decoding, samples frames by time, and decodes only the groups of
pictures that contain them. It is exact for constant and variable frame rates. Every unusable file, including
a truncated one, raises `MediaError`.
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
from av.stream import Disposition

from storm_jax.media.frames import Clip, fill_damage, nearest_frames, sample_times
from storm_jax.media.media import Header, Media, MediaError

# A header with frames larger than 16k x 8k is damaged, or meant to exhaust memory.
MAX_PIXELS = 2**27
# Containers whose index allows seeking to any keyframe; others are decoded from the start.
_SEEKABLE = ("mp4", "matroska")
# Seeking to a keyframe costs about as much as decoding this many frames.
_JUMP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Timeline:
    """Timestamps of a video's frames.

    Attributes:
      stamps: int64 [n], sorted, in units of `base` seconds.
      keyframes: timestamps of the keyframes, sorted; empty if decoding must begin at the start.
      numbered: True if the container stores no timestamps, so frames are identified by display order.
      step: mean time between frames, in seconds.
      first, last: declared times of the first and the last frame, in seconds.
      gaps: float64 [g, 2], start and end in seconds of what the file has lost before its last frame.
      damage: what is missing from the file; "" if it is complete.
    """

    stamps: np.ndarray
    base: Fraction
    keyframes: np.ndarray
    numbered: bool
    step: float
    first: float
    last: float
    gaps: np.ndarray
    damage: str

    @functools.cached_property
    def seconds(self) -> np.ndarray:
        return self.stamps * float(self.base)

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """Frame number by timestamp."""
        return {stamp: number for number, stamp in enumerate(self.stamps.tolist())}


def read_video(
    medium: Media,
    num_frames: int,
    image_size: int,
    max_damage: float = 0.0,
    out: np.ndarray | None = None,
) -> Clip:
    """Reads exactly `num_frames` frames, evenly spaced in time between `medium.start` and `medium.end`.

    The frame nearest to each time is used, so short videos repeat frames. Frames are rotated upright and
    resized (bicubic) to `image_size` x `image_size` regardless of aspect ratio, as in SigLIP's
    preprocessing. Up to a fraction `max_damage` of unreadable frames is replaced by the nearest readable
    one.

    Args:
      out: uint8 [F, H, W, 3] to write the frames to.

    Raises:
      MediaError: the file is missing, broken, empty or truncated, or ends before `medium.start`.
    """
    with _reading(medium), _opened(medium) as video:
        timeline = _read_timeline(video)
        if timeline.damage and not max_damage:
            raise MediaError(medium, "truncated", timeline.damage)
        seconds = timeline.seconds - timeline.first
        times = sample_times(medium, timeline.last - timeline.first, num_frames)
        picks = nearest_frames(seconds, times)
        lost = times > seconds[-1] + timeline.step + 0.1
        for begin, end in timeline.gaps - timeline.first:
            lost |= (times >= begin) & (times < end)
        if out is None:
            out = np.empty((num_frames, image_size, image_size, 3), np.uint8)
        found = _FrameBuffer(picks, out)
        errors = _decode(video, timeline, found)
    cause = "unreadable" if errors else "truncated"
    readable = np.isin(picks, list(found.numbers)) & ~lost
    problem = [*errors, timeline.damage or "the frames are not in the file"][0]
    return fill_damage(medium, found.frames, picks, seconds, readable, max_damage, cause, problem)


def duration(medium: Media) -> float:
    """Returns the seconds from the first to the last frame.

    Raises:
      MediaError: as `read_video`.
    """
    return video_header(medium).seconds


def video_header(medium: Media) -> Header:
    """Returns the size of a video's frames, and its duration.

    Durations in headers are often wrong, so timestamps are read: from the index of an MP4, else from
    every packet of the file.

    Raises:
      MediaError: as `read_video`.
    """
    with _reading(medium), _opened(medium) as video:
        return Header(video.stream.width, video.stream.height, _duration(video))


def _duration(video: _Video) -> float:
    if video.is_mp4 and video.stream.time_base:
        stamps = [e.timestamp for e in video.stream.index_entries if not e.is_discard]
        if stamps:
            return float((max(stamps) - min(stamps)) * video.stream.time_base)
    timeline = _read_timeline(video)
    return timeline.last - timeline.first


@contextlib.contextmanager
def _reading(medium: Media) -> Iterator[None]:
    """Converts errors of PyAV and the file system to MediaError."""
    try:
        yield
    except MediaError:
        raise
    except OSError as error:  # those of FFmpeg among them
        raise MediaError.of(medium, error) from error
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(medium, "unreadable", _message(error)) from error


def _message(error: Exception) -> str:
    """Returns the text of an error, without the error number and file name that FFmpeg adds."""
    return getattr(error, "strerror", None) or str(error)


@dataclasses.dataclass
class _Video:
    """An open file and its best video stream."""

    medium: Media
    container: av.container.InputContainer
    stream: av.VideoStream

    @property
    def is_seekable(self) -> bool:
        return any(name in self.container.format.name for name in _SEEKABLE)

    @property
    def is_avi(self) -> bool:
        return self.container.format.name == "avi"

    @property
    def is_mp4(self) -> bool:
        return "mp4" in self.container.format.name

    @property
    def is_matroska(self) -> bool:
        return "matroska" in self.container.format.name


@contextlib.contextmanager
def _opened(medium: Media) -> Iterator[_Video]:
    video = _Video(medium, *_open(medium))
    try:
        yield video
    finally:
        video.container.close()


def _open(medium: Media) -> tuple[av.container.InputContainer, av.VideoStream]:
    source = medium.open()
    if isinstance(source, str):
        source = f"file:{source}"  # FFmpeg takes what precedes a colon for a protocol
    # A playlist must not open other files or the network.
    container = av.open(source, "r", options={"protocol_whitelist": "file"})
    try:
        stream = best_stream(container)
        if stream is None:
            raise MediaError(medium, "empty", "no video stream")
        if stream.codec_context is None:
            raise MediaError(medium, "unreadable", "incomplete header")
        if stream.width * stream.height > MAX_PIXELS:
            size = f"{stream.width} x {stream.height}"
            raise MediaError(medium, "unreadable", f"frames of {size} pixels are too large")
    except MediaError:
        container.close()
        raise
    # Files are decoded in parallel instead, and frame threads would hide a truncated file.
    stream.codec_context.thread_count = 1
    # Raise an error for a damaged frame instead of returning an approximation.
    stream.codec_context.options = {"err_detect": "explode"}
    return container, stream


def best_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """FFmpeg's choice, but never the picture of an audio file's cover."""
    films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return best if best in films else next(iter(films), None)


def _read_timeline(video: _Video) -> _Timeline:
    medium, stream = video.medium, video.stream
    damage = ""
    packets: list[av.Packet] = []
    try:
        packets += (packet for packet in video.container.demux(stream) if packet.size)
    except av.error.FFmpegError as error:
        damage = _message(error)
    if not packets:
        raise MediaError(medium, "empty", "no frames")
    base, end = stream.time_base, _declared_end(stream)
    # An MP4's index excludes trimmed frames; its header counts them.
    declared = len(stream.index_entries) if video.is_mp4 else stream.frames
    # Frames trimmed without re-encoding are still in the file but must not be shown.
    stamps: Sequence[int | None] = [packet.pts for packet in packets if not packet.is_discard]
    numbered = video.is_avi or None in stamps  # AVI stores only the decoding order
    if numbered:
        base = base if video.is_avi and base else 1 / (stream.guessed_rate or Fraction(25))
        decoded = {packet.dts for packet in packets if packet.dts is not None}
        stamps = sorted(decoded) if len(decoded) == len(packets) else list(range(len(packets)))
    times = np.unique(np.array(stamps, np.int64))
    if not len(times) or base is None:
        raise MediaError(medium, "empty", "no frames")
    keys = [packet.pts for packet in packets if packet.is_keyframe and not numbered]
    seconds = times * float(base)
    step = (seconds[-1] - seconds[0]) / max(1, len(times) - 1)
    first, last = seconds[0], seconds[-1]
    shown_until = max(((p.pts or 0) + (p.duration or 0) for p in packets), default=0)
    if declared > len(packets) + 1:  # some muxers count one frame too many
        damage = damage or f"{len(packets)} of {declared} frames"
        last = seconds[0] + step * (declared - 1)
    if end is not None and max(last, float(shown_until * base)) + 2 * step + 0.1 < end:
        damage = damage or f"the file ends at {last:.2f} of {end:.2f} s"
        last = end - step
    gaps = _gaps(video, seconds, step)
    if len(gaps):
        damage = damage or f"frames from {gaps[0, 0] - min(first, gaps[0, 0]):.2f} s are lost"
        first = min(first, gaps[0, 0])
    keyframes = np.unique(np.array(keys if video.is_seekable else [], np.int64))
    return _Timeline(
        stamps=times,
        base=base,
        keyframes=keyframes,
        numbered=numbered,
        step=float(step),
        first=float(first),
        last=float(last),
        gaps=gaps,
        damage=damage,
    )


def _gaps(video: _Video, seconds: np.ndarray, step: float) -> np.ndarray:
    """Spans [g, 2] without frames around keyframes that only a Matroska file's index lists.

    FFmpeg skips a whole cluster at a damaged byte, without an error.
    """
    if not video.is_matroska:
        return np.empty((0, 2))
    with contextlib.suppress(av.error.FFmpegError):
        video.container.seek(0, stream=video.stream)  # the index is read on the first seek
    base = float(video.stream.time_base or 0)
    indexed = np.array([entry.timestamp * base for entry in video.stream.index_entries])
    nearest = seconds[nearest_frames(seconds, indexed)]
    lost = indexed[np.abs(nearest - indexed) > step + 0.1]
    after = np.searchsorted(seconds, lost)
    lost, after = lost[after < len(seconds)], after[after < len(seconds)]
    begin = np.where(after > 0, np.minimum(lost, seconds[after - 1] + step / 2), lost)
    return np.stack([begin, seconds[after] - step / 2], axis=-1)


def _declared_end(stream: av.VideoStream) -> float | None:
    """Returns the end of the stream in seconds, which Matroska declares per track."""
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except (KeyError, ValueError):
        return None


class Scaler:
    """Scales decoded frames to uint8 [size, size, 3], upright."""

    def __init__(self, size: int):
        self._size = size
        self._reformat = (
            av.video.reformatter.VideoReformatter().reformat
        )  # reused, because setting it up is slow

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        image = frame
        if frame.interlaced_frame:
            # The scaler would resize each field by itself and keep the combs. Without the flag it blends
            # the fields, as ffmpeg does.
            image = av.VideoFrame.from_ndarray(frame.reformat(format="rgb24").to_ndarray(), "rgb24")
        size = self._size
        image = self._reformat(image, size, size, "rgb24", interpolation="BICUBIC")
        return _upright(image.to_ndarray(), frame)


class _FrameBuffer:
    """Buffer for the sampled frames; a frame number may occur several times in `picks`."""

    def __init__(self, picks: np.ndarray, frames: np.ndarray):
        self.picks, self.frames = picks, frames
        self.numbers: set[int] = set()
        self._scale = Scaler(frames.shape[1])

    def put(self, number: int, frame: av.VideoFrame) -> None:
        first, last = np.searchsorted(self.picks, [number, number + 1])
        self.frames[first:last] = self._scale(frame)
        self.numbers.add(number)


def _decode(video: _Video, timeline: _Timeline, found: _FrameBuffer) -> list[str]:
    """Decodes the sampled frames into `found` and returns the decoding errors."""
    errors: list[str] = []

    def take(start: int | None, wanted: set[int]) -> None:
        if start is None:  # decode from the beginning: reopen the file
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
        # The index is wrong, or frames after a keyframe depend on frames before it (open GOP).
        errors.clear()
        take(None, missing)
    return errors


def _readable(video: _Video, start: int | None, errors: list[str]) -> Iterator[av.VideoFrame]:
    """Yields frames in display order, from the keyframe at `start`.

    After an error, resumes at the next keyframe: the frames in between may depend on what was lost.
    """
    lost = False
    try:
        for packet in video.container.demux(video.stream):
            # Frames displayed before the keyframe may follow it in the stream and depend on earlier ones.
            is_early = start is not None and packet.pts is not None and packet.pts < start
            if is_early or (lost and packet.size and not packet.is_keyframe):
                continue
            lost = False
            try:
                yield from packet.decode()
            except av.error.FFmpegError as error:
                errors.append(_message(error))
                video.stream.codec_context.flush_buffers()
                lost = True
    except av.error.FFmpegError as error:
        errors.append(_message(error))


def _jumps(timeline: _Timeline, picks: np.ndarray) -> Iterator[tuple[int | None, list[int]]]:
    """Yields (keyframe to seek to, frame numbers to decode from it); None decodes from the start."""
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
    """Yields (frame number in display order, frame)."""
    if timeline.numbered:
        yield from enumerate(frames)
        return
    for frame in frames:
        if frame.pts in timeline.numbers:
            yield timeline.numbers[frame.pts], frame


def _upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Applies the frame's display matrix (quarter turns, mirroring) to a square image [S, S, 3]."""
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
    """Writes uint8 [F, H, W, 3] as H.264 in MP4. Equal frames produce equal bytes.

    The file is written under a temporary name and renamed when complete.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(partial), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # mbtree makes the output of small videos nondeterministic.
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
