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

_TIME = r"((?:\d+:)?\d{1,2}:\d{1,2}(?:[,.]\d{1,3})?)"
_SPAN = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_PUNCTUATION = "€‚„…‘’“”•–—™¡«»¿°·©®£§´¨ªº½¼¾\u00a0"
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Line:
    """A subtitle, shown from `start` until just before `end`, in seconds."""

    start: float
    end: float
    text: str


def read_srt(path: pathlib.Path) -> list[Line]:
    """Reads the subtitles of an .srt file, without formatting. Each starts at a line of times; the number
    above that line is dropped.

    Raises:
      ValueError: if its encoding is unknown, or it has text but no times.
    """
    text = _decoded(path.read_bytes())
    rows = text.splitlines()
    spans = {number: span for number, row in enumerate(rows) if (span := _SPAN.match(row))}
    if text.strip() and not spans:
        raise ValueError("it contains no times such as 00:01:02,500 --> 00:01:04,000")
    lines = []
    for start, end in itertools.pairwise([*spans, len(rows) + 1]):
        text_rows = rows[start + 1 : end - 1]
        if end <= len(rows) and not rows[end - 1].strip().isdigit():
            text_rows.append(rows[end - 1])
        first, last = (_seconds(time.replace(",", ".")) for time in spans[start].groups())
        lines.append(Line(first, last, " ".join(_TAG.sub("", " ".join(text_rows)).split())))
    return lines


def _decoded(data: bytes) -> str:
    """UTF-8, UTF-16 with or without a mark, or Western European text.

    Raises:
      ValueError: if it looks like none of these; a wrong guess would put garbage into prompts.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if len(data) > 1 and not len(data) % 2:
        for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
            zeros, others = data[offset::2], data[1 - offset :: 2]
            if zeros.count(0) > 0.7 * len(zeros) and others.count(0) < 0.1 * len(others):
                return data.decode(encoding)
    text = data.decode("utf-8-sig", errors="replace")
    stray = text.count("\ufffd")
    if "\0" not in text and (
        not stray
        or data.startswith(codecs.BOM_UTF8)
        or sum(not c.isascii() for c in text) > 2 * stray  # most of what is not ASCII is valid
    ):
        return text.replace("\ufffd", "")
    text = data.decode("cp1252")
    letters = [character for character in text if character.isalpha()]
    accented = [letter for letter in letters if not letter.isascii()]
    odd = any(not (c.isascii() or c.isalpha() or c in _PUNCTUATION) for c in text)
    if "\0" in text or odd or len(accented) > 0.2 * len(letters):
        raise ValueError("its encoding is unknown: convert it to UTF-8")
    return text


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
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
