"""A reference to an image or a video, and the error for one that cannot be read."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

_LONGEST_NAME = 200  # in messages


class MediaError(ValueError):
    """A medium that cannot be read; `cause` is the category that skips are counted by."""

    def __init__(self, medium: Media, cause: str, message: str):
        name = medium.name
        if len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME // 2]}...{name[-_LONGEST_NAME // 2 :]}"
        super().__init__(f"{medium.kind} {name} is {cause}: {message}")
        self.medium, self.cause, self.message = medium, cause, message

    @classmethod
    def of(cls, medium: Media, error: OSError) -> MediaError:
        """The error for a file or folder that cannot be opened."""
        if isinstance(error, FileNotFoundError):
            return cls(medium, "missing", "no such file")
        return cls(medium, "unreadable", error.strerror or str(error))

    def __reduce__(self) -> tuple:  # errors are pickled between processes
        return MediaError, (self.medium, self.cause, self.message)


class Header(NamedTuple):
    """Size of a medium's frames in pixels, and its length in seconds."""

    width: int
    height: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """An image or a video: a file, a folder of frames, a byte range of a file, or bytes.

    Attributes:
      kind: "image" or "video".
      name: name used in error messages.
      path: file that contains it, or a folder of frames; None if `data` contains it.
      span: (offset, size) in bytes within the file; None for the whole file.
      data: encoded bytes, or a function that reads them. If the function returns None, `path` is read.
      start, end: part of a video to use, in seconds from its first frame; an `end` of None is the last
        frame.
      fps: of a folder, the frames per second that it holds (1 by default); of a file, how many to sample,
        instead of `data.frames.fps`.
      nframes: how many frames to sample, if that is fewer than `compression.num_frames`.
    """

    kind: str
    name: str
    path: pathlib.Path | None = None
    span: tuple[int, int] | None = None
    data: bytes | Callable[[], bytes | None] | None = dataclasses.field(default=None, repr=False)
    start: float = 0.0
    end: float | None = None
    fps: float | None = None
    nframes: int | None = None

    def check_exists(self) -> None:
        """Raises MediaError if the file or folder is missing or not accessible."""
        if self.data is None and self.path is not None:
            try:
                self.path.stat()
            except OSError as error:
                raise MediaError.of(self, error) from error

    def is_folder(self) -> bool:
        """Whether it is a folder of frames."""
        # Path.is_dir raises if the name is too long.
        return self.data is None and self.span is None and os.path.isdir(self.path or "")  # noqa: PTH112

    @classmethod
    def file(cls, kind: str, path: str | pathlib.Path) -> Media:
        return cls(kind=kind, name=str(path), path=pathlib.Path(path))

    def open(self) -> str | io.BytesIO:
        """Returns what PyAV and Pillow can open: a path, or bytes.

        Raises:
          OSError: the file that contains it cannot be read.
        """
        data = self.data() if callable(self.data) else self.data
        if data is not None:
            return io.BytesIO(data)
        if self.span is None:
            return str(self.path)
        assert self.path is not None
        offset, size = self.span
        with self.path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))
