"""Finds and reads the files of a benchmark, in any of its layouts."""

from __future__ import annotations

import glob
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.files import write_atomically

VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".flv", ".mpg", ".ts",
)  # fmt: skip


def first_match(root: pathlib.Path, patterns: Sequence[str]) -> pathlib.Path | None:
    """The first file in a folder that matches a pattern; earlier patterns take precedence."""
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            return path
    return None


def read_rows(root: pathlib.Path, patterns: Sequence[str], title: str) -> list[dict[str, Any]]:
    """Reads the .parquet or .json file that `first_match` finds, with all its shards.

    Raises:
      BenchmarkError: if there is none, or it is damaged.
    """
    path = first_match(root, patterns)
    if path is None:
        raise BenchmarkError(
            f"--data_root={root} contains none of {title}'s annotation files: {', '.join(patterns)}"
        )
    shards = re.sub(r"-\d{5}-of-(\d{5})\.parquet$", r"-*-of-\1.parquet", glob.escape(path.name))
    return [row for shard in sorted(path.parent.glob(shards)) for row in read_file(shard)]


def read_file(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows of a .parquet file, or of a .json file that is a list of objects.

    Raises:
      BenchmarkError: if it is damaged.
    """
    if path.suffix == ".parquet":
        try:
            return pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"{path} cannot be read: {error}") from error
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BenchmarkError(f"{path} must be a list of objects")
    return rows


def read_json(path: pathlib.Path) -> Any:
    """Reads a .json file.

    Raises:
      BenchmarkError: if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}") from error


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a .json file that people may read, atomically."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


class FileFinder:
    """Finds files by name in several folders; each folder is listed once.

    An exact match comes first, then one with another suffix of `suffixes`, then one that ignores case.
    `folders` are relative to `root`. Folders of frames are found like files.
    """

    def __init__(
        self,
        root: pathlib.Path,
        folders: Sequence[str],
        suffixes: Sequence[str] = VIDEO_SUFFIXES,
    ):
        self._folders = [root / folder for folder in folders]
        self._suffixes = suffixes
        self._listed: dict[pathlib.Path, tuple[dict[str, str], dict[str, str]]] = {}

    def find(self, name: str) -> pathlib.Path | None:
        """The file with a name, which may have no suffix and may include a folder; None if there is none."""
        relative = pathlib.PurePosixPath(name)
        for folder in self._folders:
            parent = folder / relative.parent
            exact, folded = self._list(parent)
            stem = self._stem(relative.name)
            found = exact.get(relative.name) or exact.get(stem) or folded.get(stem.casefold())
            if found and is_there(parent / found):  # it may be a dangling link
                unpacked = parent / found / found  # a file in a folder of its name
                return unpacked if is_there(unpacked) else parent / found
        return None

    def path(self, name: str) -> pathlib.Path:
        """Like `find`, but returns the first place where the file could be if there is none."""
        return self.find(name) or self._folders[0] / name

    def _stem(self, name: str) -> str:
        path = pathlib.PurePath(name)
        return path.stem if path.suffix.lower() in self._suffixes else name

    def _list(self, folder: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
        """The names in a folder by name and stem, and by case-folded stem."""
        if folder not in self._listed:
            try:
                names = sorted(path.name for path in folder.iterdir())
            except OSError:  # it does not exist, or may not be read
                names = []
            files = [name for name in names if self._stem(name) != name]
            folders = [name for name in names if self._stem(name) == name]
            exact: dict[str, str] = {}
            folded: dict[str, str] = {}
            for name in (*files, *(name for name in folders if (folder / name).is_dir())):
                exact.setdefault(self._stem(name), name)
                folded.setdefault(self._stem(name).casefold(), name)
            self._listed[folder] = ({name: name for name in names} | exact, folded)
        return self._listed[folder]


def is_there(path: pathlib.Path) -> bool:
    """Whether a file or folder exists and is accessible."""
    try:
        return path.exists()
    except OSError:  # the name is too long, or permission is denied
        return False


def archives(root: pathlib.Path) -> list[str]:
    """Names of archives in a folder and its subfolders, as downloaded from the hub."""
    names = (path.name for pattern in ("*", "*/*") for path in root.glob(pattern))
    return sorted(name for name in names if ".tar" in name or name.endswith(".zip"))
