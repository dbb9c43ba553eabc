"""Video files: the right frames are sampled, written bytes are reproducible, and every bad file raises
`MediaError` with the right cause."""

from __future__ import annotations

import pathlib
import struct
from fractions import Fraction

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from media_files import numbers as barcodes
from media_files import write_numbered

from storm_jax.media import video as video_lib
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media, MediaError
from storm_jax.media.video import duration, read_video, write_video

COUNT, STEP, FPS = 20, 12, 8


def read(path: pathlib.Path, num_frames: int, size: int, damage: float = 0.0, **clip) -> Clip:
    medium = Media(kind="video", name=str(path), path=path, **clip)
    return read_video(medium, num_frames, size, damage)


def numbered(count: int = COUNT, height: int = 32, width: int = 32) -> np.ndarray:
    """Frames whose brightness encodes their number."""
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
    clip = read(tmp_path / "a.mp4", COUNT, 32)
    assert clip.frames.shape == frames.shape and clip.frames.dtype == np.uint8
    error = np.abs(clip.frames.astype(int) - frames).mean((1, 2, 3))
    assert error.max() < 6, error
    np.testing.assert_allclose(clip.times, np.arange(COUNT) / FPS)


@pytest.mark.parametrize("count", [1, 2, 3, 7, COUNT - 1, COUNT, COUNT + 1, 3 * COUNT])
def test_exactly_the_requested_number_of_evenly_spaced_frames(video: pathlib.Path, count: int):
    clip = read(video, count, 32)
    picks = numbers(clip.frames)
    assert len(picks) == len(clip.times) == count
    assert picks[0] == 0
    assert count == 1 or picks[-1] == COUNT - 1
    off = np.abs(np.array(picks) - np.linspace(0, COUNT - 1, count))
    assert off.max() <= 0.5 + 1e-6, picks
    np.testing.assert_allclose(clip.times, np.array(picks) / FPS)


def test_short_video_duplicates_frames_in_order(video: pathlib.Path):
    picks = numbers(read(video, 2 * COUNT, 32).frames)
    assert picks == sorted(picks) and set(picks) == set(range(COUNT))


def test_video_of_one_frame_is_repeated(tmp_path: pathlib.Path):
    write_video(tmp_path / "one.mp4", numbered()[9:10], FPS)
    clip = read(tmp_path / "one.mp4", 3, 32)
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
    clip = read(path, count, 32)
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
    frames[:, ::7, ::5] = 90  # something to predict, so that B-frames are used
    clip = read(encode_video(tmp_path / name, frames, codec, **options), COUNT, 32)
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
    frame = read(tmp_path / "a.mp4", 1, 32).frames[0]
    quarters = {
        f"{row} {column}": frame[rows, columns].mean()
        for row, rows in (("top", slice(0, 16)), ("bottom", slice(16, 32)))
        for column, columns in (("left", slice(0, 16)), ("right", slice(16, 32)))
    }
    assert [name for name, level in quarters.items() if level > 100] == [bright]


@pytest.mark.parametrize("interval", [2, COUNT])
def test_video_trimmed_without_reencoding_starts_at_the_trim_point(
    encode_video, tmp_path: pathlib.Path, interval: int
):
    """As phones trim: frames before the start stay in the file but are not shown."""
    video = encode_video(tmp_path / "whole.mp4", numbered(), g=str(interval), bf="0")
    with av.open(str(video)) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        cut = int(5 / FPS / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, copy
                target.mux(packet)
    clip = read(tmp_path / "a.mp4", COUNT - 5, 32)
    assert numbers(clip.frames) == list(range(5, COUNT))


def test_video_with_a_long_last_frame_is_complete(tmp_path: pathlib.Path):
    path = tmp_path / "slides.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(frame, "rgb24") for frame in numbered()]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        max(packets, key=lambda packet: packet.pts).duration = 3 * FPS
        for packet in packets:
            container.mux(packet)
    assert numbers(read(path, COUNT, 32).frames) == list(range(COUNT))


def test_frames_are_resized_to_a_square(tmp_path: pathlib.Path):
    frames = numbered(4, height=32, width=64)
    frames[:, :, 32:] = 200
    write_video(tmp_path / "wide.mp4", frames, FPS)
    clip = read(tmp_path / "wide.mp4", 4, 20)
    assert clip.frames.shape == (4, 20, 20, 3)
    np.testing.assert_allclose(clip.frames[:, :, 13:], 200, atol=12)
    np.testing.assert_allclose(clip.frames[0, :, :7], 0, atol=12)


def test_frames_above_the_size_of_slice_threads_are_read_too(tmp_path: pathlib.Path):
    write_video(tmp_path / "large.mp4", numbered(4, 160, 160), FPS)
    assert numbers(read(tmp_path / "large.mp4", 4, 16).frames) == [0, 1, 2, 3]


# Every codec and container, by number.

FORMATS = [
    ("mp4", "libx264", {"bf": "3"}),
    ("mkv", "libx264", {"bf": "3"}),
    ("mov", "libx264", {"bf": "3"}),
    ("avi", "libx264", {"bf": "3"}),  # stores only the decoding order
    ("ts", "libx264", {"bf": "3"}),
    ("mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1"}),
    ("mp4", "libx265", {"bf": "3"}),
    ("mkv", "libx265", {"bf": "3"}),
    ("webm", "libvpx-vp9", {"deadline": "realtime"}),
    ("mp4", "libvpx-vp9", {"deadline": "realtime"}),
    ("mp4", "libsvtav1", {"preset": "12"}),
    ("webm", "libsvtav1", {"preset": "12"}),
    ("mp4", "mpeg4", {"bf": "2"}),
    ("avi", "mpeg4", {"bf": "2"}),
    ("mov", "mpeg4", {}),
    ("gif", "gif", {"pix_fmt": "rgb8"}),
]


@pytest.mark.parametrize(("container", "codec", "options"), FORMATS)
def test_every_format_returns_the_requested_frames(
    tmp_path: pathlib.Path, container: str, codec: str, options: dict[str, str]
):
    """All frames (sequential decoding), a few (seeking to keyframes), and one."""
    path = write_numbered(tmp_path / f"a.{container}", 60, codec, g="10", **options)
    for count in (60, 6, 1):
        clip = read(path, count, 32)
        want = np.linspace(0, 59, count).round().astype(int).tolist()
        assert barcodes(clip.frames) == want
        np.testing.assert_allclose(clip.times, np.array(want) / 10, atol=2e-3)
    part = read(path, 3, 32, start=2.0, end=4.0)
    assert barcodes(part.frames) == [20, 30, 40]
    np.testing.assert_allclose(part.times, [2, 3, 4], atol=2e-3)


@pytest.mark.parametrize("options", [{"bf": "3"}, {"bf": "3", "x264-params": "open-gop=1"}])
def test_seeking_to_keyframes_changes_no_frame(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
):
    path = write_numbered(tmp_path / "a.mp4", 120, g="12", **options)
    jumped = [read(path, count, 32) for count in range(1, 40)]
    monkeypatch.setattr(video_lib, "_SEEKABLE", ())
    for clip in jumped:
        np.testing.assert_array_equal(clip.frames, read(path, len(clip.frames), 32).frames)


def test_few_frames_of_a_long_video_decode_few_groups(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_numbered(tmp_path / "a.mp4", 240, g="12")
    decoded = []
    real = video_lib._numbered

    def counted(frames, timeline):
        for number, frame in real(frames, timeline):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(video_lib, "_numbered", counted)
    read(path, 4, 32)
    assert len(decoded) <= 4 * 12


@hypothesis.given(
    stamps=st.sets(st.integers(0, 300), min_size=1, max_size=60),
    keys=st.sets(st.integers(0, 59), max_size=10),
    picks=st.sets(st.integers(0, 59), min_size=1, max_size=20),
)
def test_jumps_cover_every_pick_from_a_keyframe_before_it(stamps, keys, picks):
    times = np.array(sorted(stamps))
    keyframes = times[sorted({0} | {key for key in keys if key < len(times)})]
    wanted = np.array(sorted({pick % len(times) for pick in picks}))
    timeline = video_lib._Timeline(
        stamps=times,
        base=Fraction(1),
        keyframes=keyframes,
        numbered=False,
        step=1.0,
        first=float(times[0]),
        last=float(times[-1]),
        gaps=np.empty((0, 2)),
        damage="",
    )
    jumps = list(video_lib._jumps(timeline, wanted))
    assert [pick for _, members in jumps for pick in members] == wanted.tolist()
    for start, members in jumps:
        assert start in keyframes and start <= times[members[0]]


@pytest.mark.parametrize(
    ("size", "codec", "pix_fmt", "container"),
    [
        ((1, 1), "gif", "rgb8", "gif"),
        ((1, 1), "libvpx-vp9", "yuv420p", "webm"),
        ((33, 47), "libx264", "yuv444p", "mp4"),
        ((33, 47), "mpeg4", "yuv420p", "mp4"),
    ],
)
def test_odd_sizes_are_read(tmp_path: pathlib.Path, size, codec, pix_fmt, container):
    path = write_numbered(tmp_path / f"a.{container}", 9, codec, size=size, pix_fmt=pix_fmt)
    clip = read(path, 9, 16)
    assert clip.frames.shape == (9, 16, 16, 3)
    if size != (1, 1):
        assert barcodes(clip.frames) == list(range(9))


# Parts of a video.


def test_bounds_are_seconds_from_the_first_frame(video: pathlib.Path):
    clip = read(video, 5, 32, start=0.5, end=1.0)
    assert numbers(clip.frames) == [4, 5, 6, 7, 8]
    np.testing.assert_allclose(clip.times, np.array([4, 5, 6, 7, 8]) / FPS)
    assert numbers(read(video, 2, 32, start=2.0).frames) == [16, COUNT - 1]
    assert numbers(read(video, 2, 32, end=99.0).frames) == [0, COUNT - 1]


def test_start_after_the_end_is_an_error(video: pathlib.Path):
    with pytest.raises(MediaError, match=r"the video ends at 2.38 s, before start=3"):
        read(video, 4, 32, start=3.0)


def test_duration_is_about_that_of_the_frames(video: pathlib.Path, tmp_path: pathlib.Path):
    assert duration(Media.file("video", video)) == pytest.approx(COUNT / FPS, abs=0.2)
    for container, codec in (("mkv", "libx264"), ("ts", "libx264"), ("avi", "mpeg4")):
        path = write_numbered(tmp_path / f"a.{container}", 30, codec)
        assert duration(Media.file("video", path)) == pytest.approx(3, abs=0.3)
    with pytest.raises(MediaError, match="missing"):
        duration(Media.file("video", tmp_path / "none.mp4"))


# Tolerated damage.


def write_truncated(path: pathlib.Path, part: float, **options) -> pathlib.Path:
    """A video that declares 60 frames but is truncated."""
    write_numbered(path, 60, g="6", muxer={"movflags": "faststart"}, bf="0", **options)
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[: start + int((len(data) - start) * part)])
    return path


def test_a_damaged_tail_is_an_error_unless_tolerated(tmp_path: pathlib.Path):
    path = write_truncated(tmp_path / "a.mp4", 0.7)
    with pytest.raises(MediaError, match="truncated"):
        read(path, 12, 32)
    with pytest.raises(MediaError, match=r"\d of 12 frames are unreadable"):
        read(path, 12, 32, damage=0.1)
    clip = read(path, 12, 32, damage=0.5)
    want = np.linspace(0, 59, 12).round().astype(int).tolist()
    got = barcodes(clip.frames)
    good = 12 - clip.damaged
    assert 2 <= clip.damaged <= 6
    assert got[:good] == want[:good]
    assert len(set(got[good:])) == 1 and got[good] >= got[good - 1]
    assert len(clip.frames) == len(clip.times) == 12


def test_frames_damaged_in_the_middle_are_replaced_by_their_neighbours(tmp_path: pathlib.Path):
    path = write_numbered(tmp_path / "a.mp4", 60, g="6", bf="0", size=(96, 128))
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    middle = start + (end - start) // 2
    data[middle : middle + 60] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(MediaError):
        read(path, 60, 32)
    clip = read(path, 60, 32, damage=0.5)
    wrong = [i for i, number in enumerate(barcodes(clip.frames)) if number != i]
    assert 0 < len(wrong) <= clip.damaged <= 30
    assert all(abs(barcodes(clip.frames[i : i + 1])[0] - i) <= 20 for i in wrong)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_flipped_bytes_are_an_error_or_a_clip_of_the_right_shape(
    tmp_path: pathlib.Path, rng: np.random.Generator, container: str, codec: str
):
    path = write_numbered(tmp_path / f"a.{container}", 30, codec)
    whole = path.read_bytes()
    errors = 0
    for _ in range(40):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 30):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert read(path, 4, 16).frames.shape == (4, 16, 16, 3)
        except MediaError as error:
            assert error.cause in ("unreadable", "truncated", "empty")
            errors += 1
    assert errors > 20


# What is written.


def test_equal_frames_give_equal_bytes(video: pathlib.Path, tmp_path: pathlib.Path):
    write_video(tmp_path / "another name.mp4", numbered(), FPS)
    write_video(tmp_path / "reversed.mp4", numbered()[::-1], FPS)
    assert (tmp_path / "another name.mp4").read_bytes() == video.read_bytes()
    assert (tmp_path / "reversed.mp4").read_bytes() != video.read_bytes()


class _Interrupted:
    """Frames whose source fails after many are already on disk (encoders buffer dozens)."""

    shape = (200, 32, 32, 3)

    def __iter__(self):
        rng = np.random.default_rng(0)
        for _ in range(100):
            yield rng.integers(0, 256, self.shape[1:]).astype(np.uint8)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (numbered(4, 33, 33), av.error.FFmpegError),  # yuv420p requires even sides
        (numbered(4).astype(np.float32), ValueError),
        (_Interrupted(), KeyboardInterrupt),
    ],
    ids=["odd size", "wrong type", "interrupted"],
)
@pytest.mark.parametrize("old", [None, b"an existing video"])
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
        path.write_text("This is not a video.\n" * 100)
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
    with pytest.raises(MediaError) as caught:
        read(path, 4, 32)
    assert caught.value.cause == cause
    assert caught.value.medium.path == path and str(path) in str(caught.value)


def test_file_truncated_anywhere_in_its_frames_is_a_video_error(
    video: pathlib.Path, tmp_path: pathlib.Path
):
    data, path = video.read_bytes(), tmp_path / "cut.mp4"
    for size in range(0, data.index(b"moov"), 97):
        path.write_bytes(data[:size])
        with pytest.raises(MediaError):
            read(path, 4, 32)


def test_file_truncated_in_its_header_is_a_video_error(video: pathlib.Path, tmp_path: pathlib.Path):
    data, path = video.read_bytes(), tmp_path / "cut.mp4"
    for size in range(data.index(b"moov"), data.index(b"stsz"), 7):
        path.write_bytes(data[:size])
        with pytest.raises(MediaError):
            read(path, 4, 32)


@pytest.mark.parametrize(
    ("name", "codec", "muxer", "options"),
    [
        ("fragments.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, {"g": "4"}),
        ("a.avi", "mpeg4", {}, {}),
        ("a.mkv", "libx264", {}, {}),
        ("a.webm", "libvpx-vp9", {}, {}),
    ],
)
def test_stream_truncated_in_the_middle_is_a_video_error(
    encode_video,
    tmp_path: pathlib.Path,
    rng: np.random.Generator,
    name: str,
    codec: str,
    muxer: dict,
    options: dict,
):
    frames = rng.integers(0, 256, (COUNT, 32, 32, 3)).astype(
        np.uint8
    )  # so that the header is a small part of the file
    path = encode_video(tmp_path / name, frames, codec, muxer=muxer, **options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(MediaError):
        read(path, 4, 32)
