"""LLaVA JSON (one list) and JSON lines. The file is memory-mapped; records are parsed on access."""

from __future__ import annotations

import functools
import json
import mmap
import pathlib
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
        try:
            return json.loads(self._bytes[offset : offset + size])
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SampleError(str(index), "malformed", f"invalid JSON: {error}") from None

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
      DataError: the file is empty, cannot be read, or is a list with invalid JSON.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_CHUNK).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]
        spans = _find_items(path) if start == b"[" else _find_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if start not in (b"[", b"{"):
        raise DataError(
            f"{path} is not a JSON list or JSON lines: it begins with {start!r}, not '[' or '{{'"
        )
    if not len(spans):
        raise DataError(f"{path} contains no samples")
    return spans


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


def _find_items(path: pathlib.Path) -> np.ndarray:
    """Finds the records of one list. The whole file is read."""
    data = path.read_bytes()
    text = data.removeprefix(_BYTE_ORDER_MARK).decode()
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int, int]] = []
    position, offset, line = (
        text.index("[") + 1,
        len(data) - len(data.removeprefix(_BYTE_ORDER_MARK)),
        1,
    )
    counted = 0  # position in `text` that `offset` and `line` refer to
    expects_item = True
    try:
        while True:
            while text[position] in " \t\r\n":
                position += 1
            if text[position] == "]" and not (expects_item and spans):
                break
            if not expects_item:
                if text[position] != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
                position, expects_item = position + 1, True
                continue
            _, end = decoder.raw_decode(text, position)
            offset += len(text[counted:position].encode())
            line += text.count("\n", counted, position)
            size = len(text[position:end].encode())
            spans.append((offset, size, line))
            line += text.count("\n", position, end)
            offset, counted, position, expects_item = offset + size, end, end, False
    except (json.JSONDecodeError, IndexError, RecursionError) as error:
        where = text.count("\n", 0, position) + 1
        problem = "the file ends inside the list" if isinstance(error, IndexError) else error
        raise DataError(f"{path} line {where}: invalid JSON: {problem}") from None
    return np.array(spans, np.int64).reshape(-1, 3)
