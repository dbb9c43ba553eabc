"""A reference to an image or a video, and the error for one that cannot be read."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable


class MediaError(ValueError):
    """A medium that cannot be read; `cause` is the category that skips are counted by."""

    def __init__(self, medium: Media, cause: str, message: str):
        super().__init__(f"{medium.kind} {medium.name} is {cause}: {message}")
        self.medium, self.cause, self.message = medium, cause, message

    def __reduce__(self) -> tuple:  # errors are pickled between processes
        return MediaError, (self.medium, self.cause, self.message)


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
      fps: frames per second of a folder of frames.
    """

    kind: str
    name: str
    path: pathlib.Path | None = None
    span: tuple[int, int] | None = None
    data: bytes | Callable[[], bytes | None] | None = dataclasses.field(default=None, repr=False)
    start: float = 0.0
    end: float | None = None
    fps: float = 1.0

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
