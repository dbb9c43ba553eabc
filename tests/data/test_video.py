"""Protects video files: which frames are picked, that bytes repeat, and that every bad file is one
`VideoError` with the right cause."""

from __future__ import annotations

import pathlib
import struct

import av
import numpy as np
import pytest

from storm_jax.data.video import VideoError, read_video, write_video

COUNT, STEP, FPS = 20, 12, 8


def numbered(count: int = COUNT, height: int = 32, width: int = 32) -> np.ndarray:
    """Frames whose brightness is their number."""
    levels = (np.arange(count) * STEP).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return np.round(frames.mean((1, 2, 3)) / STEP).astype(int).tolist()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    write_video(path, numbered(), FPS)
    return path


# What is read.


def test_round_trip_keeps_content_count_and_times(tmp_path: pathlib.Path):
    frames = numbered()
    for i, frame in enumerate(frames):
        frame[4:20, i : i + 12] = (230, 30, 200 - 8 * i)
    write_video(tmp_path / "a.mp4", frames, FPS)
    clip = read_video(tmp_path / "a.mp4", COUNT, 32)
    assert clip.frames.shape == frames.shape and clip.frames.dtype == np.uint8
    error = np.abs(clip.frames.astype(int) - frames).mean((1, 2, 3))
    assert error.max() < 6, error
    np.testing.assert_allclose(clip.times, np.arange(COUNT) / FPS)


@pytest.mark.parametrize("count", [1, 2, 3, 7, COUNT - 1, COUNT, COUNT + 1, 3 * COUNT])
def test_exactly_the_asked_number_of_evenly_spaced_frames(video: pathlib.Path, count: int):
    clip = read_video(video, count, 32)
    picks = numbers(clip.frames)
    assert len(picks) == len(clip.times) == count
    assert picks[0] == 0
    assert count == 1 or picks[-1] == COUNT - 1
    off = np.abs(np.array(picks) - np.linspace(0, COUNT - 1, count))
    assert off.max() <= 0.5 + 1e-6, picks
    np.testing.assert_allclose(clip.times, np.array(picks) / FPS)


def test_short_video_duplicates_frames_in_order(video: pathlib.Path):
    picks = numbers(read_video(video, 2 * COUNT, 32).frames)
    assert picks == sorted(picks) and set(picks) == set(range(COUNT))


def test_video_of_one_frame_is_repeated(tmp_path: pathlib.Path):
    write_video(tmp_path / "one.mp4", numbered()[9:10], FPS)
    clip = read_video(tmp_path / "one.mp4", 3, 32)
    assert numbers(clip.frames) == [9, 9, 9]
    assert clip.times.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["vfr.mkv", "vfr.mp4"])
@pytest.mark.parametrize(
    ("count", "picks"), [(3, [0, 4, 7]), (4, [0, 3, 6, 7]), (7, [0, 3, 3, 4, 6, 7, 7])]
)
def test_variable_frame_rate_is_picked_by_time(
    encode_video, tmp_path: pathlib.Path, name: str, count: int, picks: list[int]
):
    pts = [0, 1, 2, 13, 30, 31, 32, 60]
    path = encode_video(tmp_path / name, numbered(len(pts)), pts=pts)
    clip = read_video(path, count, 32)
    assert numbers(clip.frames) == picks
    # Matroska stores milliseconds.
    np.testing.assert_allclose(clip.times, np.array(pts)[picks] / 8, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3"}),
        ("a.mkv", "libx264", {"bf": "3"}),
        ("a.mov", "libx264", {"bf": "0"}),
        ("a.ts", "libx264", {"bf": "2"}),  # does not start at time 0
        ("a.avi", "mpeg4", {"qscale": "2"}),
        ("a.webm", "libvpx-vp9", {"crf": "10"}),
    ],
)  # fmt: skip
def test_frames_come_in_display_order_from_every_container(
    encode_video, tmp_path: pathlib.Path, name: str, codec: str, options: dict[str, str]
):
    frames = numbered()
    frames[:, ::7, ::5] = 90  # something to predict, so that B-frames are made
    clip = read_video(encode_video(tmp_path / name, frames, codec, **options), COUNT, 32)
    distance = np.abs(clip.frames[:, None].astype(int) - frames[None]).mean((2, 3, 4))
    assert distance.argmin(1).tolist() == list(range(COUNT))
    assert clip.times[0] == 0


@pytest.mark.parametrize(
    ("matrix", "bright"),
    [
        ((1, 0, 0, 1), "top left"),
        ((0, 1, -1, 0), "top right"),  # a quarter clockwise
        ((0, -1, 1, 0), "bottom left"),
        ((-1, 0, 0, -1), "bottom right"),
        ((-1, 0, 0, 1), "top right"),  # mirrored, as front cameras do
        ((1, 0, 0, -1), "bottom left"),
    ],
)
def test_frames_are_turned_upright(tmp_path: pathlib.Path, matrix: tuple, bright: str):
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 220  # top left
    write_video(tmp_path / "a.mp4", frames, FPS)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # of the track header, version 0
    a, b, c, d = (entry << 16 for entry in matrix)
    data[start : start + 24] = struct.pack(">6i", a, b, 0, c, d, 0)
    (tmp_path / "a.mp4").write_bytes(data)
    frame = read_video(tmp_path / "a.mp4", 1, 32).frames[0]
    quarters = {
        f"{row} {column}": frame[rows, columns].mean()
        for row, rows in (("top", slice(0, 16)), ("bottom", slice(16, 32)))
        for column, columns in (("left", slice(0, 16)), ("right", slice(16, 32)))
    }
    assert [name for name, level in quarters.items() if level > 100] == [bright]


@pytest.mark.parametrize("interval", [2, COUNT])
def test_video_trimmed_without_encoding_starts_at_the_cut(
    encode_video, tmp_path: pathlib.Path, interval: int
):
    """As phones trim: frames before the cut stay in the file, but are not shown."""
    video = encode_video(tmp_path / "whole.mp4", numbered(), g=str(interval), bf="0")
    with av.open(str(video)) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        cut = int(5 / FPS / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, copy
                target.mux(packet)
    clip = read_video(tmp_path / "a.mp4", COUNT - 5, 32)
    assert numbers(clip.frames) == list(range(5, COUNT))


def test_video_that_holds_its_last_frame_is_whole(tmp_path: pathlib.Path):
    path = tmp_path / "slides.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(frame, "rgb24") for frame in numbered()]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        max(packets, key=lambda packet: packet.pts).duration = 3 * FPS
        for packet in packets:
            container.mux(packet)
    assert numbers(read_video(path, COUNT, 32).frames) == list(range(COUNT))


def test_frames_are_resized_to_a_square(tmp_path: pathlib.Path):
    frames = numbered(4, height=32, width=64)
    frames[:, :, 32:] = 200
    write_video(tmp_path / "wide.mp4", frames, FPS)
    clip = read_video(tmp_path / "wide.mp4", 4, 20)
    assert clip.frames.shape == (4, 20, 20, 3)
    np.testing.assert_allclose(clip.frames[:, :, 13:], 200, atol=12)
    np.testing.assert_allclose(clip.frames[0, :, :7], 0, atol=12)


def test_frames_above_the_size_of_slice_threads_are_read_too(tmp_path: pathlib.Path):
    write_video(tmp_path / "large.mp4", numbered(4, 160, 160), FPS)
    assert numbers(read_video(tmp_path / "large.mp4", 4, 16).frames) == [0, 1, 2, 3]


# What is written.


def test_equal_frames_give_equal_bytes(video: pathlib.Path, tmp_path: pathlib.Path):
    write_video(tmp_path / "another name.mp4", numbered(), FPS)
    write_video(tmp_path / "reversed.mp4", numbered()[::-1], FPS)
    assert (tmp_path / "another name.mp4").read_bytes() == video.read_bytes()
    assert (tmp_path / "reversed.mp4").read_bytes() != video.read_bytes()


class _Interrupted:
    """Frames whose source fails when many are on disk already (encoders hold back dozens)."""

    shape = (200, 32, 32, 3)

    def __iter__(self):
        rng = np.random.default_rng(0)
        for _ in range(100):
            yield rng.integers(0, 256, self.shape[1:]).astype(np.uint8)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (numbered(4, 33, 33), av.error.FFmpegError),  # odd sides are impossible in yuv420p
        (numbered(4).astype(np.float32), ValueError),
        (_Interrupted(), KeyboardInterrupt),
    ],
    ids=["odd size", "wrong type", "interrupted"],
)
@pytest.mark.parametrize("old", [None, b"the video that was there"])
def test_failed_write_leaves_the_folder_as_it_was(
    tmp_path: pathlib.Path, frames, error: type[BaseException], old: bytes | None
):
    if old is not None:
        (tmp_path / "a.mp4").write_bytes(old)
    with pytest.raises(error):
        write_video(tmp_path / "a.mp4", frames, FPS)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"a.mp4": old} if old else {})


def test_write_leaves_only_the_video(video: pathlib.Path):
    assert [p.name for p in video.parent.iterdir()] == [video.name]


# Bad files.


def _bad_file(kind: str, folder: pathlib.Path, good: pathlib.Path, encode_video) -> pathlib.Path:
    path = folder / "bad.mp4"
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("This is no video.\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "index first, half the frames":
        encode_video(path, numbered(), muxer={"movflags": "faststart"})
        data = path.read_bytes()
        path.write_bytes(data[: (data.index(b"mdat") + len(data)) // 2])
    elif kind == "index first, no frames":
        encode_video(path, numbered(), muxer={"movflags": "faststart"})
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"mdat") + 4])
    elif kind == "audio only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("missing", "missing"),
        ("directory", "unreadable"),
        ("text", "unreadable"),
        ("empty", "unreadable"),
        ("half", "unreadable"),
        ("index first, half the frames", "truncated"),
        ("index first, no frames", "empty"),
        ("audio only", "empty"),
    ],
)
def test_bad_file_is_a_video_error_with_its_cause(
    video: pathlib.Path, encode_video, tmp_path: pathlib.Path, kind: str, cause: str
):
    path = _bad_file(kind, tmp_path, video, encode_video)
    with pytest.raises(VideoError) as caught:
        read_video(path, 4, 32)
    assert caught.value.cause == cause
    assert caught.value.path == str(path) and str(path) in str(caught.value)


def test_file_cut_anywhere_in_its_frames_is_a_video_error(
    video: pathlib.Path, tmp_path: pathlib.Path
):
    data, path = video.read_bytes(), tmp_path / "cut.mp4"
    for size in range(0, data.index(b"moov"), 97):
        path.write_bytes(data[:size])
        with pytest.raises(VideoError):
            read_video(path, 4, 32)


def test_file_cut_in_its_header_is_a_video_error(video: pathlib.Path, tmp_path: pathlib.Path):
    data, path = video.read_bytes(), tmp_path / "cut.mp4"
    for size in range(data.index(b"moov"), data.index(b"stsz"), 7):
        path.write_bytes(data[:size])
        with pytest.raises(VideoError):
            read_video(path, 4, 32)


@pytest.mark.parametrize(
    ("name", "codec", "muxer", "options"),
    [
        ("fragments.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, {"g": "4"}),
        ("a.avi", "mpeg4", {}, {}),
        ("a.mkv", "libx264", {}, {}),
        ("a.webm", "libvpx-vp9", {}, {}),
    ],
)
def test_stream_cut_in_the_middle_is_a_video_error(
    encode_video,
    tmp_path: pathlib.Path,
    rng: np.random.Generator,
    name: str,
    codec: str,
    muxer: dict,
    options: dict,
):
    frames = rng.integers(0, 256, (COUNT, 32, 32, 3)).astype(np.uint8)  # the header is a small part
    path = encode_video(tmp_path / name, frames, codec, muxer=muxer, **options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(VideoError):
        read_video(path, 4, 32)
