"""Frames of a camera, a network stream or a file, as they arrive.

    with Source("rtsp://camera/stream", fps=1, size=448) as source:
        for frames, times in source.blocks(): ...

A thread reads ahead. Live input that is read too slowly loses its oldest frames, which are counted, and a connection
that breaks is opened again. A file loses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import queue
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

from storm_jax.inference.streaming.time_grid import TimeGrid
from storm_jax.inference.streaming.video import BLOCK
from storm_jax.media.video import Scaler, best_stream

_AHEAD = 4 * BLOCK  # frames that wait to be used
_STALL = 10.0  # seconds without data, after which a connection counts as broken
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a connection is opened again


class SourceError(ValueError):
    """A file or device that cannot be read."""


@dataclasses.dataclass
class Counts:
    """What happened so far: frames that were taken and not used, and connections after the first one."""

    dropped: int = 0
    reconnects: int = 0
    problem: str = ""  # of the last connection that broke


def is_live(url: str) -> bool:
    """Whether frames arrive in their own time: network streams and cameras, rather than files."""
    return bool(re.match(r"(?!file:)\w+://|/dev/video", url))


class Source:
    """Frames of one input.

    Attributes:
      is_live: see `is_live`.
    """

    def __init__(self, url: str, fps: float, size: int):
        """Opens a file; reading and connections begin with `with`.

        Args:
          fps: frames per second to take; 0 takes all.
          size: height and width that frames are resized to.

        Raises:
          SourceError: the file does not exist or is no video. A connection is awaited instead.
        """
        self.is_live = is_live(url)
        self.counts = Counts()
        self._url, self._scale, self._grid = url, Scaler(size), TimeGrid(fps)
        self._waiting: queue.Queue[tuple[np.ndarray, float] | SourceError | None] = queue.Queue(
            _AHEAD
        )
        self._stop = threading.Event()
        self._began = 0.0
        self._last = 0.0  # time of the newest frame
        read = (
            self._read_live if self.is_live else functools.partial(self._read_file, _open_file(url))
        )
        self._thread = threading.Thread(target=read, daemon=True)

    def __enter__(self) -> Source:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_STALL)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the frames that have arrived, uint8 [F, H, W, 3], and their times in seconds, [F].

        F is 0 if none arrives for a tenth of a second, so that a caller can do something else.

        Raises:
          SourceError: the file is damaged; after the frames before.
        """
        while True:
            taken: list[tuple[np.ndarray, float]] = []
            end: SourceError | bool | None = False
            try:
                while len(taken) < BLOCK:
                    item = self._waiting.get(timeout=0.1 if not taken else 0.0)
                    if item is None or isinstance(item, SourceError):
                        end = item
                        break
                    taken.append(item)
            except queue.Empty:
                pass
            if taken:
                frames, times = zip(*taken, strict=True)
                yield np.stack(frames), np.array(times)
            elif end is False:
                yield np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
            if isinstance(end, SourceError):
                raise end
            if end is None:
                return

    def _read_file(self, container: Any) -> None:
        try:
            with contextlib.closing(container):
                self._read(container)
        except Exception as error:  # decoders can raise anything
            self._put(
                SourceError(f"{_path(self._url)} is damaged after {self._last:.2f} s: {error}")
            )
        else:
            self._put(None)

    def _read_live(self) -> None:
        wait = _FIRST_WAIT
        while not self._stop.is_set():
            before = self._last
            try:
                with contextlib.closing(_connect(self._url)) as container:
                    self._read(container)
                self.counts.problem = "the stream ended"
            except Exception as error:  # decoders can raise anything
                self.counts.problem = str(error)
            wait = _FIRST_WAIT if self._last > before else min(2 * wait, _LONGEST_WAIT)
            self.counts.reconnects += 1
            self._stop.wait(wait)

    def _read(self, container: Any) -> None:
        """Reads until the end."""
        stream = best_stream(container)
        if stream is None:
            raise SourceError("it has no video")
        stream.thread_type = "AUTO"
        offset = None  # a new connection continues at the time of the clock
        for frame in container.decode(stream):
            if self._stop.is_set():
                return
            now = time.monotonic() - self._began if self.is_live else 0.0
            shown = now if frame.time is None else frame.time
            if offset is None:
                offset = max(now, self._last) - shown
            self._last = max(self._last, shown + offset)
            if self._grid.takes(self._last):
                self._put((self._scale(frame), self._last))

    def _put(self, item: tuple[np.ndarray, float] | SourceError | None) -> None:
        while not self._stop.is_set():
            try:
                self._waiting.put(item, timeout=0 if self.is_live else 0.1)
                return
            except queue.Full:
                if self.is_live:
                    with contextlib.suppress(queue.Empty):
                        self._waiting.get_nowait()
                        self.counts.dropped += 1


def _path(url: str) -> pathlib.Path:
    return pathlib.Path(url.removeprefix("file://").removeprefix("file:"))


def _open_file(url: str) -> Any:
    path = _path(url)
    try:
        # A playlist must not open other files or the network.
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"{path} cannot be read: {reason}") from error
    if best_stream(container) is None:
        container.close()
        raise SourceError(f"{path} cannot be read: it has no video")
    return container


def _connect(url: str) -> Any:
    if url.startswith("/dev/"):
        return av.open(url, format="v4l2")
    options = {"rtsp_transport": "tcp"} if url.startswith("rtsp") else {}
    return av.open(url, options=options, timeout=_STALL)
