"""Files of subtitles, and which of their lines are shown at given times."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np

_TIME = r"(\d+:\d{1,2}:\d{1,2}[,.]\d{1,3})"
_SPAN = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Line:
    """A subtitle, shown from `start` to before `end`, in seconds."""

    start: float
    end: float
    text: str


def read_srt(path: pathlib.Path) -> list[Line]:
    """The subtitles of a file in their order, without formatting. A line of times begins one; the number
    before it is not part of the one before."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    rows = text.splitlines()
    spans = {number: span for number, row in enumerate(rows) if (span := _SPAN.match(row))}
    lines = []
    for start, end in itertools.pairwise([*spans, len(rows) + 1]):
        said = rows[start + 1 : end - 1]
        if end <= len(rows) and not rows[end - 1].strip().isdigit():
            said.append(rows[end - 1])
        first, last = (_seconds(time.replace(",", ".")) for time in spans[start].groups())
        lines.append(Line(first, last, " ".join(_TAG.sub("", " ".join(said)).split())))
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
