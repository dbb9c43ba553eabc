"""Some small frames of a video in one JPEG.

They are saved while an evaluation runs, since its report shows questions that are chosen by their
score, and decoding their videos again would take long.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import pathlib
from collections.abc import Mapping
from typing import Any

from PIL import Image

from storm_jax.files import read_lines
from storm_jax.media.frames import Clip

FRAMES, COLUMNS = 16, 8
_PIXELS = 96
_QUALITY = 80


@dataclasses.dataclass(frozen=True)
class Thumbnails:
    """Frames in rows of 8 in one JPEG, and their times in seconds; () for a still image."""

    jpeg: bytes
    times: tuple[float, ...]

    @classmethod
    def of(cls, clip: Clip, kind: str) -> Thumbnails:
        """The frames of a clip, each at most 96 pixels wide.

        Args:
          kind: "image" or "video".
        """
        pixels = min(_PIXELS, clip.frames.shape[1])
        columns, rows = _grid(len(clip.frames))
        grid = Image.new("RGB", (columns * pixels, rows * pixels), "white")
        for number, frame in enumerate(clip.frames):
            small = Image.fromarray(frame).resize((pixels, pixels), Image.Resampling.BOX)
            grid.paste(small, (number % columns * pixels, number // columns * pixels))
        data = io.BytesIO()
        grid.save(data, "jpeg", quality=_QUALITY, subsampling=0)
        times = () if kind == "image" else tuple(round(float(time), 2) for time in clip.times)
        return cls(data.getvalue(), times)

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows."""
        return _grid(max(1, len(self.times)))

    @property
    def base64(self) -> str:
        return base64.b64encode(self.jpeg).decode()

    def to_fields(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"times": list(self.times), "jpeg": self.base64}

    @classmethod
    def from_fields(cls, line: Mapping[str, Any]) -> Thumbnails:
        """Raises KeyError, TypeError or ValueError if the fields or the picture are damaged."""
        jpeg, times = (
            base64.b64decode(line["jpeg"], validate=True),
            tuple(map(float, line["times"])),
        )
        try:
            Image.open(io.BytesIO(jpeg)).load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"the picture is damaged: {error}") from error
        return cls(jpeg, times)


def _grid(count: int) -> tuple[int, int]:
    return min(count, COLUMNS), -(-count // COLUMNS)


def read_thumbnails(folder: pathlib.Path) -> dict[str, Thumbnails]:
    """The thumbnails in an evaluation's folder, by question id; questions about a video share them."""
    found = {}
    for path in sorted(folder.glob("thumbnails.*.jsonl")):
        for ids, thumbnails in read_lines(
            path, lambda line: (map(str, line["ids"]), Thumbnails.from_fields(line))
        ):
            found.update(dict.fromkeys(ids, thumbnails))
    return found
