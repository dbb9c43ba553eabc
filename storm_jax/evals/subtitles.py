"""Files of subtitles, and which of their lines are shown at given times."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np

_TIME = r"(\d+):(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_SPAN = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Line:
    """A subtitle, shown from `start` to before `end`, in seconds."""

    start: float
    end: float
    text: str


def read_srt(path: pathlib.Path) -> list[Line]:
    """The subtitles of a file in their order, without formatting; a block without times is left out."""
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    lines = []
    for block in re.split(r"\n\s*\n", text):
        rows = block.strip().split("\n")
        for number, row in enumerate(rows):
            if span := _SPAN.match(row):
                said = " ".join(rows[number + 1 :])
                values = [int(group) for group in span.groups()]
                values[3], values[7] = (int(span[i].ljust(3, "0")) for i in (4, 8))
                start, end = (
                    h * 3600 + m * 60 + s + ms / 1000 for h, m, s, ms in (values[:4], values[4:])
                )
                lines.append(Line(start, end, " ".join(_TAG.sub("", said).split())))
                break
    return lines


def read_json(path: pathlib.Path, duration: float) -> list[Line]:
    """LongVideoBench's subtitles, whose lines are {"timestamp": [start, end], "text"} or {"start": "H:M:S",
    "end": "H:M:S", "line"}; one without an end lasts until `duration`."""
    lines = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        if "timestamp" in row:
            start, end = row["timestamp"]
            lines.append(Line(float(start), float(duration if end is None else end), row["text"]))
        else:
            lines.append(Line(_seconds(row["start"]), _seconds(row["end"]), row["line"]))
    return lines


def shown_at(lines: Sequence[Line], times: np.ndarray) -> list[Line]:
    """The lines with text that are shown at one of the times, in the order of the file."""
    return [
        line for line in lines if line.text and ((line.start <= times) & (times < line.end)).any()
    ]


def _seconds(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
