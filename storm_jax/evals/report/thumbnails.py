"""A few small frames of a video, as one JPEG strip.

Strips are saved while an evaluation runs, since its report shows questions that are chosen by their
score, and decoding their videos again would take long.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from storm_jax.files import read_lines
from storm_jax.media.frames import Clip

FRAMES = 8
_PIXELS = 128
_QUALITY = 80


@dataclasses.dataclass(frozen=True)
class Thumbnails:
    """Frames next to each other in one JPEG, and their times in seconds; () for a still image."""

    jpeg: bytes
    times: tuple[float, ...]

    @classmethod
    def of(cls, clip: Clip, kind: str) -> Thumbnails:
        """The frames of a clip, each at most 128 pixels wide.

        Args:
          kind: "image" or "video".
        """
        strip = Image.fromarray(np.concatenate(list(clip.frames), axis=1))
        scale = min(1.0, _PIXELS / strip.height)
        if scale < 1:
            strip = strip.resize((round(strip.width * scale), _PIXELS), Image.Resampling.BOX)
        data = io.BytesIO()
        strip.save(data, "jpeg", quality=_QUALITY, subsampling=0)
        times = () if kind == "image" else tuple(round(float(time), 2) for time in clip.times)
        return cls(data.getvalue(), times)

    @property
    def base64(self) -> str:
        return base64.b64encode(self.jpeg).decode()

    def to_fields(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"times": list(self.times), "jpeg": self.base64}

    @classmethod
    def from_fields(cls, line: Mapping[str, Any]) -> Thumbnails:
        return cls(base64.b64decode(line["jpeg"]), tuple(line["times"]))


def read_thumbnails(folder: pathlib.Path) -> dict[str, Thumbnails]:
    """The thumbnails in an evaluation's folder, by question id; questions about a video share them."""
    found = {}
    for path in sorted(folder.glob("thumbnails.*.jsonl")):
        for line in read_lines(path):
            found.update(dict.fromkeys(line["ids"], Thumbnails.from_fields(line)))
    return found
