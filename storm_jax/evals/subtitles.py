"""Reads subtitle files, and selects the lines shown at given times."""

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
    """A subtitle, shown from `start` until just before `end`, in seconds."""

    start: float
    end: float
    text: str


def read_srt(path: pathlib.Path) -> list[Line]:
    """Reads the subtitles of an .srt file, without formatting. Each starts at a line of times; the number
    above that line is dropped."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    rows = text.splitlines()
    spans = {number: span for number, row in enumerate(rows) if (span := _SPAN.match(row))}
    lines = []
    for start, end in itertools.pairwise([*spans, len(rows) + 1]):
        text_rows = rows[start + 1 : end - 1]
        if end <= len(rows) and not rows[end - 1].strip().isdigit():
            text_rows.append(rows[end - 1])
        first, last = (_seconds(time.replace(",", ".")) for time in spans[start].groups())
        lines.append(Line(first, last, " ".join(_TAG.sub("", " ".join(text_rows)).split())))
    return lines


def read_json(path: pathlib.Path, duration: float) -> list[Line]:
    """Reads subtitles of LongVideoBench: {"timestamp": [start, end], "text"} or {"start": "H:M:S",
    "end": "H:M:S", "line"}. Those without an end last until `duration`."""
    lines = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        if "timestamp" in row:
            start, end = row["timestamp"]
            lines.append(Line(float(start), float(duration if end is None else end), row["text"]))
        else:
            lines.append(Line(_seconds(row["start"]), _seconds(row["end"]), row["line"]))
    return lines


def shown_at(lines: Sequence[Line], times: np.ndarray) -> list[Line]:
    """The non-empty lines shown at any of the times, in file order."""
    return [
        line for line in lines if line.text and ((line.start <= times) & (times < line.end)).any()
    ]


def _seconds(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
