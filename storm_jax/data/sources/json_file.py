"""JSON files: a list of records, JSON lines, or an object that contains the records.

The file is memory-mapped; records are parsed on access.
"""

from __future__ import annotations

import functools
import itertools
import json
import mmap
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from storm_jax.config import SourceConfig
from storm_jax.data.cache import cached_arrays
from storm_jax.data.records import parse_record
from storm_jax.data.skips import DataError
from storm_jax.files import file_stamp
from storm_jax.text.sample import Sample, SampleError

_CHUNK = 2**26
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SMALL = 2**24  # bytes; indexing a smaller file is faster than caching its index


class JsonFile:
    """The records of one file. The positions of records in a large file are cached in `index_folder`."""

    def __init__(self, config: SourceConfig, index_folder: pathlib.Path):
        self.name = config.name
        self.path = pathlib.Path(config.path)
        self.stamp = file_stamp([self.path])
        self._root = pathlib.Path(config.media_root or self.path.parent)
        if self.path.stat().st_size < _SMALL:
            self._spans = find_records(self.path)
        else:
            find = lambda: {"spans": find_records(self.path)}  # noqa: E731
            self._spans = cached_arrays(index_folder, "records", self.stamp, find)["spans"]

    def __len__(self) -> int:
        return len(self._spans)

    def record(self, index: int) -> Any:
        """Returns the parsed JSON of one record.

        Raises:
          SampleError: the record is not valid JSON.
        """
        offset, size, _ = self._spans[index].tolist()
        text = self._bytes[offset : offset + size]
        try:
            if not text.startswith(b'"'):
                return json.loads(text)
            [(key, record)] = json.loads(b"{" + text + b"}").items()  # `"key": record`
        except (ValueError, RecursionError) as error:
            raise SampleError(str(index), "malformed", f"invalid JSON: {error}") from None
        return {"id": key, **record} if isinstance(record, dict) else record

    def sample(self, index: int) -> Sample:
        return parse_record(self.record(index), self._root, index)

    def where(self, index: int) -> str:
        return f"{self.path} line {self._spans[index, 2]}, record {index}"

    @functools.cached_property
    def _bytes(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def find_records(path: pathlib.Path) -> np.ndarray:
    """Returns offset and size in bytes and line number of each record, int64 [M, 3].

    Raises:
      DataError: the file is empty, cannot be read, or contains something else.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_CHUNK).removeprefix(_BYTE_ORDER_MARK).lstrip()
        if head[:1] == b"[":
            spans = _find_in_document(path)
        elif head[:1] == b"{":
            spans = _find_lines(path) if _is_json_lines(head) else _find_in_document(path)
        else:
            raise DataError(
                f"{path} is not a JSON list or JSON lines: it begins with {head[:1]!r}, not '[' or '{{'"
            )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not len(spans):
        raise DataError(f"{path} contains no samples")
    return spans


def _is_json_lines(head: bytes) -> bool:
    """Whether a file that begins with an object has one record per line."""
    first, _, rest = head.partition(b"\n")
    try:
        record = _DECODER.decode(first.decode())
    except (ValueError, RecursionError):
        # A damaged line, if what follows it is a line too.
        return rest.lstrip(b" \t\r\n")[:1] == b"{" or not first.rstrip().endswith(
            (b"{", b"[", b",")
        )
    return bool(rest.strip()) or _is_record(record)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and ("conversations" in value or "messages" in value)


def _find_lines(path: pathlib.Path) -> np.ndarray:
    """Finds the records of JSON lines; blank lines are skipped."""
    newlines, offset = [], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + offset)
            offset += len(chunk)
    ends = np.concatenate([*newlines, [offset]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    spans = np.stack([starts, ends - starts, np.arange(1, len(ends) + 1)], axis=1)
    short = np.flatnonzero(spans[:, 1] <= 2)  # a blank line, or "\r"
    with path.open("rb") as file:
        blank = [i for i in short.tolist() if not _read(file, *spans[i, :2].tolist()).strip()]
    return np.delete(spans, blank, axis=0)


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


# Finding records needs no integers, and Python refuses to convert those of thousands of digits.
_DECODER = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")
_Span = tuple[int, int]


def _find_in_document(path: pathlib.Path) -> np.ndarray:
    """Finds the records of a list, of an object, or of records that span several lines. Reads the file."""
    data = path.read_bytes()
    text = data.removeprefix(_BYTE_ORDER_MARK).decode()
    document = _Document(text)
    try:
        spans = document.records()
    except (ValueError, IndexError, RecursionError) as error:
        where = text.count("\n", 0, document.position) + 1
        problem = "the file ends too early" if isinstance(error, IndexError) else error
        raise DataError(f"{path} line {where}: invalid JSON: {problem}") from None
    if spans is None:
        keys = ", ".join(map(repr, itertools.islice(_DECODER.decode(text), 5)))
        raise DataError(
            f"{path} is one JSON object with the keys {keys}: expected a list of records, a record per "
            f"line, or an object with one list of records or with records by id"
        )
    return _in_bytes(text, spans, len(data) - len(data.removeprefix(_BYTE_ORDER_MARK)))


class _Document:
    """Scans a JSON text. `position` is where an error occurred."""

    def __init__(self, text: str):
        self.text, self.position = text, 0

    def records(self) -> list[_Span] | None:
        """Returns the spans of the records; None if there are none in a known place."""
        self._skip_space()
        if self.text[self.position] == "[":
            return self._items()
        first, found = self.position, []
        while self.position < len(self.text):
            start = self.position
            value = self._value()
            found.append((start, self.position))
            self._skip_space()
        if len(found) > 1 or _is_record(value):
            return found
        self.position = first
        return self._members()

    def _members(self) -> list[_Span] | None:
        """The records of an object: those of its only list, or its values with their keys."""
        lists: list[int] = []
        values: list[tuple[_Span, bool]] = []
        self._take("{")
        while not self._ends_with("}", first=not values):
            start = self.position
            self._value()
            self._skip_space()
            self._take(":")
            value_at = self.position
            value = self._value()
            if isinstance(value, list) and any(isinstance(each, dict) for each in value):
                lists.append(value_at)
            values.append(((start, self.position), _is_record(value)))
        if len(lists) == 1:
            self.position = lists[0]
            return self._items()
        return [span for span, _ in values] if values and all(ok for _, ok in values) else None

    def _items(self) -> list[_Span]:
        spans: list[_Span] = []
        self._take("[")
        while not self._ends_with("]", first=not spans):
            start = self.position
            self._value()
            spans.append((start, self.position))
        return spans

    def _value(self) -> Any:
        value, self.position = _DECODER.raw_decode(self.text, self.position)
        return value

    def _ends_with(self, bracket: str, first: bool) -> bool:
        """Moves to the next element of a list or object, or past its end."""
        self._skip_space()
        if self.text[self.position] == bracket:
            self.position += 1
            return True
        if not first:
            self._take(",")
        return False

    def _take(self, character: str) -> None:
        if self.text[self.position] != character:
            raise ValueError(f"expected {character!r}, found {self.text[self.position]!r}")
        self.position += 1
        self._skip_space()

    def _skip_space(self) -> None:
        found = _SPACE.match(self.text, self.position)
        assert found is not None
        self.position = found.end()


def _in_bytes(text: str, spans: Sequence[_Span], offset: int) -> np.ndarray:
    """Converts spans of characters to offset and size in bytes and line number; `offset` is that of `text`."""
    found, counted, line = [], 0, 1
    for start, end in spans:
        offset += len(text[counted:start].encode())
        line += text.count("\n", counted, start)
        size = len(text[start:end].encode())
        found.append((offset, size, line))
        offset, counted = offset + size, end
        line += text.count("\n", start, end)
    return np.array(found, np.int64).reshape(-1, 3)
