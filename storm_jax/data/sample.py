"""What every source gives: a conversation about media, and the errors of samples that cannot be used."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

PLACEHOLDER = re.compile("<image>|<video>")


class DataError(ValueError):
    """A dataset that cannot be used."""


class SampleError(ValueError):
    """A sample that cannot be used; `cause` is the word it is counted under."""

    def __init__(self, sample_id: str, cause: str, message: str):
        super().__init__(f"sample {sample_id!r}: {message}")
        self.sample_id, self.cause = sample_id, cause


class MediaError(ValueError):
    """A medium that cannot be read; `cause` is the word its sample is counted under."""

    def __init__(self, medium: Media, cause: str, message: str):
        super().__init__(f"{medium.kind} {medium.name} is {cause}: {message}")
        self.medium, self.cause, self.message = medium, cause, message

    def __reduce__(self) -> tuple:  # it crosses processes
        return MediaError, (self.medium, self.cause, self.message)


@dataclasses.dataclass(frozen=True)
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
        return cls(kind, str(path), pathlib.Path(path))

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


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message; `role` is "system", "user" or "assistant"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Caption:
    """Text that stands among the tokens of a video, behind the frames that are shown by `time` (s)."""

    time: float
    text: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation about media. The n-th placeholder of its text stands for the n-th of `media`.

    `extra` keeps the record's other fields (a benchmark's family or options). Where it ends with a
    question, the answer to it begins with `opening`. `captions`, in order of time, are those of its only
    medium."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]
    extra: Mapping[str, Any]
    opening: str = ""
    captions: tuple[Caption, ...] = ()

    def prompt(self) -> Sample:
        """The sample up to its last answer, which is left out."""
        return dataclasses.replace(self, turns=self.turns[:-1])

    def answer(self) -> str:
        return self.turns[-1].text


@dataclasses.dataclass(frozen=True)
class Skip:
    """A sample that cannot be used, and why.

    Attributes:
      source, sample: names.
      where: file and line of its record.
      cause: the word it is counted under.
      file: the medium that cannot be read; "" = it is the record itself.
    """

    source: str
    sample: str
    where: str
    cause: str
    message: str
    file: str = ""
