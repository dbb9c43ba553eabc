"""Hugging Face parquet folders: columns are the fields of a record; media are `{bytes, path}` cells.

Text is read when a sample is parsed; media bytes are read only in the process that decodes them.
"""

from __future__ import annotations

import functools
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from storm_jax.config import SourceConfig
from storm_jax.data.records import parse_record
from storm_jax.data.skips import DataError
from storm_jax.files import file_stamp
from storm_jax.text.sample import Sample, SampleError

_BYTES = "bytes"
_READING = threading.Lock()  # ParquetFile is not thread-safe


class ParquetFolder:
    """The rows of all files of a folder, sorted by file name."""

    def __init__(self, config: SourceConfig, files: Sequence[pathlib.Path]):
        self.name, self.stamp = config.name, file_stamp(files)
        self._root = pathlib.Path(config.media_root or config.path)
        self._problems: dict[str, str] = {}
        self._groups = [group for file in files for group in self._groups_of(file)]
        self._ends = np.cumsum([rows for _, _, rows in self._groups], dtype=np.int64)
        if not len(self):
            raise DataError(f"{config.path} contains no samples")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _groups_of(self, file: pathlib.Path) -> list[tuple[str, int, int]]:
        """Returns (file, row group, rows). An unreadable file counts as one bad sample."""
        try:
            metadata = _open(str(file)).metadata
        except (OSError, ValueError) as error:
            self._problems[str(file)] = str(error)
            return [(str(file), 0, 1)]
        groups = range(metadata.num_row_groups)
        return [(str(file), group, metadata.row_group(group).num_rows) for group in groups]

    def sample(self, index: int) -> Sample:
        file, group, row = self._find(index)
        if file in self._problems:
            raise SampleError(
                file, "malformed", f"not a valid parquet file: {self._problems[file]}"
            )
        record = dict(_text_rows(file, group)[row])
        for column, is_list in _media_columns(file).items():
            if record.get(column) is None:
                continue
            cells = record[column] if is_list else [record[column]]
            record[column] = [
                {**(cell or {}), _BYTES: functools.partial(read_cell, file, group, row, column, i)}
                for i, cell in enumerate(cells)
            ]
        return parse_record(record, self._root, index)

    def where(self, index: int) -> str:
        file, group, row = self._find(index)
        return f"{file} row {row} of group {group}"

    def _find(self, index: int) -> tuple[str, int, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        file, group, rows = self._groups[which]
        return file, group, int(index - self._ends[which] + rows)


def read_cell(file: str, group: int, row: int, column: str, item: int) -> bytes | None:
    """Returns the bytes of one medium, or None if the cell contains only a path."""
    cell = _media_cells(file, group, column)[row].as_py()
    return (cell[item] if isinstance(cell, list) else cell)[_BYTES]


@functools.lru_cache(64)
def _open(file: str) -> pq.ParquetFile:
    return pq.ParquetFile(file, memory_map=True)


def _leaves(file: str) -> list[str]:
    """Returns the dotted paths of the leaf columns."""
    schema = _open(file).schema
    return [schema.column(i).path for i in range(len(schema))]


@functools.lru_cache(64)
def _media_columns(file: str) -> dict[str, bool]:
    """Returns the media columns, and whether their cells are lists of media."""
    leaves = [path.split(".") for path in _leaves(file)]
    return {leaf[0]: len(leaf) > 2 for leaf in leaves if leaf[-1] == _BYTES and len(leaf) > 1}


@functools.lru_cache(4)
def _text_rows(file: str, group: int) -> list[dict[str, Any]]:
    text = [path for path in _leaves(file) if not path.endswith(f".{_BYTES}")]
    with _READING:
        return _open(file).read_row_group(group, columns=text).to_pylist()


@functools.lru_cache(4)
def _media_cells(file: str, group: int, column: str) -> Any:
    with _READING:
        return _open(file).read_row_group(group, columns=[column]).column(0)
