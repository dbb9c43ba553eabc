"""An image or a video by name, and the error of one that cannot be read."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable


class MediaError(ValueError):
    """A medium that cannot be read; `cause` is the word its sample is counted under."""

    def __init__(self, medium: Media, cause: str, message: str):
        super().__init__(f"{medium.kind} {medium.name} is {cause}: {message}")
        self.medium, self.cause, self.message = medium, cause, message

    def __reduce__(self) -> tuple:  # it crosses processes
        return MediaError, (self.medium, self.cause, self.message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """An image or a video: a file, a folder of frames, a part of a file, or bytes.

    Attributes:
      kind: "image" or "video".
      name: what errors call it.
      path: the file that holds it, or a folder of frames; None when `data` does.
      span: offset and size of it inside the file, in bytes; None = all of it.
      data: the encoded bytes when its record holds them, or a function that reads them; one that gives
        None leaves it to `path`.
      start, end: seconds of a video that are shown, counted from its first frame; None = to its end.
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
        """What PyAV and Pillow open: a path, or bytes.

        Raises:
          OSError: when the file around it cannot be read.
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
