"""Videos as people have them: cover pictures, several tracks, wrong headers, odd names, raw streams,
interlaced frames and lost clusters."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import socket
import struct
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import barcode, numbers, write_numbered

from storm_jax.config import FramesConfig
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import count_frames, read_media

GREY = tuple[
    int, int, bool
]  # level of all frames, number of frames, whether it is the default track


def frames_of(path: str | pathlib.Path, count: int = 8, size: int = 32) -> np.ndarray:
    return read_media(Media.file("video", path), count, size, 0.0).frames


def write_tracks(path: pathlib.Path, *tracks: GREY) -> pathlib.Path:
    with av.open(str(path), "w") as container:
        streams = []
        for _, _, default in tracks:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            disposition = av.stream.Disposition
            stream.disposition = disposition.default if default else disposition(0)
            streams.append(stream)
        for stream, (level, count, _) in zip(streams, tracks, strict=True):
            for packet in encoded(stream, np.full((count, 48, 64, 3), level, np.uint8)):
                container.mux(packet)
    return path


def encoded(stream: av.VideoStream, frames: np.ndarray) -> Iterator[av.Packet]:
    for array in frames:
        frame = av.VideoFrame.from_ndarray(array, "rgb24").reformat(format=stream.pix_fmt)
        yield from stream.encode(frame)
    yield from stream.encode()


def picture(level: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for packet in encoded(stream, np.full((1, 64, 64, 3), level, np.uint8)):
            container.mux(packet)
    return out.getvalue()


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    while data:
        size, kind = struct.unpack(">I4s", data[:8])
        yield kind, data[8:size]
        data = data[size:]


def with_cover_first(path: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A copy of an MP4 with a cover picture in tags ahead of its tracks."""
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + picture(255)))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", cover)))
    data = b""
    for kind, body in boxes(path.read_bytes()):
        if kind == b"moov":  # after the frames, so their offsets stay
            header = struct.unpack(">I", body[:4])[0]
            body = body[:header] + tags + body[header:]
        data += box(kind, body)
    out.write_bytes(data)
    return out


def test_a_cover_picture_is_never_the_video(tmp_path):
    plain = write_numbered(tmp_path / "plain.mp4", 20)
    covered = with_cover_first(plain, tmp_path / "covered.mp4")
    with av.open(str(covered)) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    np.testing.assert_array_equal(frames_of(covered), frames_of(plain))


def test_a_file_with_only_a_cover_picture_has_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(tmp_path / "plain.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with_cover_first(tmp_path / "plain.mp4", path)
    with pytest.raises(MediaError, match="is empty: no video stream"):
        frames_of(path)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_the_default_track_is_read(tmp_path, container):
    path = write_tracks(tmp_path / f"two.{container}", (40, 20, False), (200, 20, True))
    assert frames_of(path).mean() > 150


def write_with_audio(path: pathlib.Path, seconds: float, audio: float) -> pathlib.Path:
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", 16000)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for packet in encoded(video, np.stack([barcode(i) for i in range(round(seconds * 10))])):
            container.mux(packet)
        for i in range(round(audio * 16000 / 1024)):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 16000, i * 1024
            silence.time_base = Fraction(1, 16000)
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return path


def with_wrong_duration(path: pathlib.Path) -> pathlib.Path:
    """Overwrites the duration in an MP4's media header, as recorders do that use two timescales."""
    data = bytearray(path.read_bytes())
    at = data.find(b"mdhd") + 20
    data[at : at + 4] = struct.pack(">I", 341)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["audio.mkv", "audio.mp4", "header.mp4"])
def test_frames_are_counted_from_the_videos_own_timestamps(tmp_path, name):
    """At fps=1, 4 s of video give 5 frames, whatever the audio's length or the header's duration."""
    path = tmp_path / name
    if name == "header.mp4":
        with_wrong_duration(write_numbered(path, 41))
    else:
        write_with_audio(path, 4.1, audio=60)
    medium, config = Media.file("video", path), FramesConfig(fps=1.0)
    assert count_frames(medium, 64, config) == 5
    assert read_media(medium, 5, 32, 0.0).times.tolist() == pytest.approx([0, 1, 2, 3, 4])
    part = dataclasses.replace(medium, start=2.0, end=3.5)
    count = count_frames(part, 64, config)
    assert read_media(part, count, 32, 0.0).times[[0, -1]].tolist() == pytest.approx([2, 3.5])


NAMES = ["cam1:12.mp4", "http:a.mp4", "concat:a|b.mp4", "50%03d.mp4", "#1 [a].mp4", "-.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_path_and_never_a_protocol(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_numbered(tmp_path / "plain.mp4", 8).rename(name)
    assert numbers(frames_of(name)) == list(range(8))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_playlist_does_not_reach_the_network(tmp_path, as_bytes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n"
        path = tmp_path / "list.m3u8"
        path.write_text(text)
        medium = Media.file("video", path)
        if as_bytes:
            medium = dataclasses.replace(medium, path=None, data=text.encode())
        with pytest.raises(MediaError):
            read_media(medium, 8, 32, 0.0)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("name", "codec"), [("h264", "libx264"), ("hevc", "libx265"), ("m4v", "mpeg4")]
)
def test_a_raw_stream_has_the_rate_that_its_header_declares(tmp_path, name, codec):
    path = write_numbered(tmp_path / f"raw.{name}", 21, codec, rate=10, bf="0")
    medium = Media.file("video", path)
    assert count_frames(medium, 64, FramesConfig(fps=1.0)) == 3
    clip = read_media(medium, 3, 32, 0.0)
    assert clip.times.tolist() == pytest.approx([0, 1, 2])
    assert numbers(clip.frames) == [0, 10, 20]


def test_interlaced_frames_are_blended(tmp_path):
    """Two fields that show different moments give no combs when the frame is resized."""
    path, size = tmp_path / "interlaced.mp4", (480, 640)
    combed = np.full((6, *size, 3), 30, np.uint8)
    combed[:, 0::2, 100:200], combed[:, 1::2, 150:250] = 220, 220
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"x264-params": "tff=1:bframes=0", "crf": "4"}
        flags = av.codec.context.Flags
        stream.codec_context.flags |= flags.interlaced_dct | flags.interlaced_me
        for packet in encoded(stream, combed):
            container.mux(packet)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    rows = frames_of(path, 6, 96)[..., 0].astype(int)
    assert np.abs(np.diff(rows, axis=1)).max() < 40  # combs differ by 190
    between = rows[:, :, 100 * 96 // 640 + 2]
    assert 100 < between.mean() < 150  # half of the rows show the bar there


@pytest.mark.parametrize("cluster", [0, 1, 3])
def test_a_matroska_file_with_a_lost_cluster_is_truncated(tmp_path, cluster):
    """One damaged byte hides a cluster; FFmpeg reports nothing, and times would be rebased."""
    path = write_numbered(tmp_path / "a.mkv", 60, g="10", muxer={"cluster_time_limit": "1000"})
    whole = numbers(frames_of(path, 13))
    data, mark = bytearray(path.read_bytes()), b"\x1f\x43\xb6\x75"
    at = -1
    for _ in range(cluster + 1):
        at = data.find(mark, at + 1)
    data[at + 1] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"is truncated: frames from \d\.\d\d s are lost"):
        frames_of(path, 13)
    clip = read_media(Media.file("video", path), 13, 32, 0.5)
    assert clip.damaged >= 2
    kept = np.array(numbers(clip.frames)) == whole
    assert kept.sum() == 13 - clip.damaged  # every other frame is at its own time
