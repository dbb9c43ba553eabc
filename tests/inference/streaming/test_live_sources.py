"""Live input is read in its own time and reconnected; a file loses no frame."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from storm_jax.inference.streaming.sources import Source, SourceError, is_live
from storm_jax.inference.streaming.time_grid import TimeGrid
from storm_jax.media.video import write_video

SIZE = 32
SENDER = pathlib.Path(__file__).with_name("sender.py")


def moving(count: int) -> np.ndarray:
    """Frames [F, 64, 64, 3] whose grey value is 4 times their number."""
    levels = (4 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 64, 64, 3)).copy()


def read(source: Source, count: int, seconds: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """Frames and times, until there are `count` of them or the source ends."""
    frames, times, end = [], [], time.monotonic() + seconds
    for block, stamps in source.blocks():
        if len(block):
            frames.append(block)
            times.append(stamps)
        if sum(map(len, times)) >= count or time.monotonic() > end:
            break
    return np.concatenate(frames), np.concatenate(times)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(port: int, count: int, pause: float = 0.0) -> Iterator[subprocess.Popen]:
    """A process that serves frames once: PyAV would block the threads of this one."""
    command = [sys.executable, SENDER, str(port), str(count), str(pause)]
    sender = subprocess.Popen(command)
    try:
        yield sender
    finally:
        sender.kill()
        sender.wait()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rtsp://camera/1", True),
        ("tcp://127.0.0.1:5000", True),
        ("/dev/video0", True),
        ("clip.mp4", False),
        ("file:///tmp/clip.mp4", False),
        ("a://b.mp4", True),
    ],
)
def test_kinds_of_input(url, expected):
    assert is_live(url) == expected


def test_a_file_loses_no_frame_however_slowly_it_is_read(tmp_path):
    write_video(tmp_path / "clip.mp4", moving(200) // 4, fps=8)
    with Source(str(tmp_path / "clip.mp4"), fps=0, size=SIZE) as source:
        time.sleep(0.5)
        frames, times = read(source, 10**6)
        assert source.counts.dropped == 0
    assert frames.shape == (200, SIZE, SIZE, 3)
    np.testing.assert_allclose(times, np.arange(200) / 8, atol=1e-6)
    with Source(f"file://{tmp_path}/clip.mp4", fps=2, size=SIZE) as source:
        np.testing.assert_allclose(read(source, 10**6)[1], np.arange(50) / 2, atol=1e-6)


def test_frames_arrive_over_the_network(port):
    with (
        serving(port, 20, pause=0.02),
        Source(f"tcp://127.0.0.1:{port}", fps=0, size=SIZE) as source,
    ):
        frames, times = read(source, 18)
    assert len(frames) >= 18  # the last ones may be lost with the connection
    levels = frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, 4 * np.arange(len(frames)), atol=4)
    assert (np.diff(times) > 0).all()


def test_a_broken_connection_is_opened_again_and_time_ascends(port):
    with Source(f"tcp://127.0.0.1:{port}", fps=0, size=SIZE) as source:
        with serving(port, 12, pause=0.02) as sender:
            _, before = read(source, 8)
            sender.wait(20)
        with serving(port, 12, pause=0.02):
            _, after = read(source, 8)
        assert source.counts.reconnects >= 1
        assert source.counts.problem
    times = np.concatenate([before, after])
    assert (np.diff(times) > 0).all()


def test_live_input_that_is_read_too_slowly_loses_its_oldest_frames(port, monkeypatch):
    monkeypatch.setattr("storm_jax.inference.streaming.sources._AHEAD", 4)
    with (
        serving(port, 40),
        Source(f"tcp://127.0.0.1:{port}", fps=0, size=SIZE) as source,
    ):
        end = time.monotonic() + 20
        while source.counts.dropped < 30 and time.monotonic() < end:
            time.sleep(0.05)
        frames, _ = read(source, 4)
        assert source.counts.dropped >= 30
    assert frames.mean(axis=(1, 2, 3))[-1] > 4 * 30


def test_nothing_to_connect_to_is_retried_until_the_end(port):
    with Source(f"tcp://127.0.0.1:{port}", fps=0, size=SIZE) as source:
        frames, _ = next(source.blocks())
        assert len(frames) == 0
        end = time.monotonic() + 10
        while not source.counts.problem and time.monotonic() < end:
            time.sleep(0.05)
        assert "refused" in source.counts.problem


def test_files_that_are_no_videos_are_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(SourceError, match=r"text.mp4 cannot be read: Invalid data"):
        Source(str(tmp_path / "text.mp4"), fps=1, size=SIZE)
    with pytest.raises(SourceError, match=r"none.mp4 cannot be read: No such file"):
        Source(str(tmp_path / "none.mp4"), fps=1, size=SIZE)


def test_a_grid_of_times():
    grid = TimeGrid(2.0)
    taken = [time for time in np.arange(0, 3, 0.125) if grid.takes(time)]
    assert taken == [0, 0.5, 1, 1.5, 2, 2.5]
    with pytest.raises(ValueError, match="fps=nan must be at least 0"):
        TimeGrid(float("nan"))
