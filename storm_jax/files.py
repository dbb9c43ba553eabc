"""JSON lines, atomic writes, digests.

What a run reads again is checked: its lines have a CRC, its folders a digests.json.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

_DIGESTS = "digests.json"


def is_bucket(path: pathlib.Path | epath.Path) -> bool:
    """Whether a path is a URL of Cloud Storage."""
    return os.fspath(path).startswith("gs://")


def write_atomically(path: pathlib.Path | epath.Path, text: str) -> None:
    """Writes a file so that it is complete or absent, never partial."""
    if is_bucket(path):  # objects are never partial
        path.write_text(text)
        return
    # Processes in different containers may have the same id.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        partial.write_text(text)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_lines(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file atomically."""
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def to_line(fields: Mapping[str, Any]) -> str:
    """A line of a JSONL file, with the CRC-32 of its fields, so that `read_lines` notices a changed byte."""
    return json.dumps({**fields, "crc": _crc(fields)}) + "\n"


def _crc(fields: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields).encode()):08x}"


def read_lines(
    path: pathlib.Path, parse: Callable[[dict[str, Any]], Any] = lambda line: line
) -> list[Any]:
    """Reads a JSONL file of lines that `to_line` made.

    A last line without its end was left by a process that was killed, and is dropped. Any other line that is
    no JSON object, has changed, or that `parse` rejects with a KeyError, TypeError or ValueError, is damaged:
    it is logged and dropped. Lines of earlier versions have no CRC.
    """
    found = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise TypeError("not an object")
            if line.pop("crc", _crc(line)) != _crc(line):
                raise ValueError("changed since it was written")
            found.append(parse(line))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            logging.warning("%s line %d is damaged and dropped: %r", path, number, error)
    return found


class Appender:
    """Appends whole lines to a file. Lines that cannot be written now are written with later ones."""

    def __init__(self, path: pathlib.Path):
        self._path, self._waiting = path, b""

    def write(self, lines: Iterable[str]) -> None:
        is_retry = bool(self._waiting)
        self._waiting += "".join(lines).encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(self._waiting) != len(self._waiting):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not is_retry:
                logging.warning("%s: %s: its lines are written when they can be", self._path, error)
        else:
            self._waiting = b""


def system_error(error: BaseException | None) -> str:
    """The system's words for the failed file operation behind an error, or behind what caused it; "" if none.

    Libraries in C++ put its number into their message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if number := re.search(r"(?:os_error_code='|\[errno )(\d+)", str(error)):
            return os.strerror(int(number[1]))
        error = error.__cause__ or error.__context__
    return ""


def digest(text: str | bytes) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


@contextlib.contextmanager
def rewriting(folder: pathlib.Path, names: Sequence[str]) -> Iterator[None]:
    """Files of a folder are written in this context, and their digests afterwards.

    There are no digests meanwhile, so that a process that is killed leaves files that can be read.
    """
    (folder / _DIGESTS).unlink(missing_ok=True)
    yield
    write_digests(folder, [folder / name for name in names])


def file_names(folder: pathlib.Path | epath.Path) -> list[str]:
    """Names of the files in a folder and its subfolders."""
    if is_bucket(folder):
        return list(_objects(folder))
    paths = pathlib.Path(folder).rglob("*")
    return [str(path.relative_to(folder)) for path in paths if path.is_file()]


def write_digests(
    folder: pathlib.Path | epath.Path, paths: Iterable[pathlib.Path | epath.Path]
) -> None:
    """Writes digests.json: the SHA-256 of files in a folder and its subfolders.

    In a bucket it is the MD5, which Cloud Storage has computed from what it received.
    """
    algorithm = "md5" if is_bucket(folder) else "sha256"
    digests = _digests(folder, {str(path.relative_to(folder)): algorithm for path in paths})
    write_atomically(folder / _DIGESTS, json.dumps(digests, indent=1) + "\n")


def changed_files(folder: pathlib.Path | epath.Path, prefix: str = "") -> list[str]:
    """Names, beginning with `prefix`, of files that have changed since their digests were written.

    There are none if the folder has no digests.json, as in earlier versions, or with the environment
    variable STORM_VERIFY=0.
    """
    before = None
    while os.environ.get("STORM_VERIFY") != "0":
        try:
            text = (folder / _DIGESTS).read_bytes()
        except FileNotFoundError:
            break
        changed = _changed(folder, text, prefix)
        if not changed or text == before:
            return changed
        before = text  # another process may be rewriting the files
    return []


def _changed(folder: pathlib.Path | epath.Path, digests: bytes, prefix: str) -> list[str]:
    try:
        written = {
            name: str(value)
            for name, value in json.loads(digests).items()
            if name.startswith(prefix)
        }
        # A folder may have been copied from a bucket, or into one.
        found = _digests(
            folder, {name: "md5" if len(written[name]) == 32 else "sha256" for name in written}
        )
    except (AttributeError, ValueError):
        return [_DIGESTS]
    return [name for name in written if found[name] != written[name]]


def describe_change(folder: pathlib.Path) -> str:
    """What `changed_files` finds in a folder and what to do about it; "" if nothing."""
    changed = changed_files(folder)
    if not changed:
        return ""
    return (
        f"{folder / changed[0]} has changed since it was written: restore it from a copy, or, if it was "
        f"changed on purpose, remove {folder / _DIGESTS}"
    )


def _digests(folder: pathlib.Path | epath.Path, algorithms: Mapping[str, str]) -> dict[str, str]:
    """Digests of files by name, given the algorithm of each; of a missing one, "missing"."""
    stored = _stored_md5(folder) if is_bucket(folder) else {}

    def digest_of(name: str) -> str:
        if algorithms[name] == "md5" and name in stored:
            return stored[name]
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, algorithms[name]).hexdigest()
        except FileNotFoundError:
            return "missing"

    with concurrent.futures.ThreadPoolExecutor() as threads:
        return dict(zip(algorithms, threads.map(digest_of, algorithms), strict=True))


def _stored_md5(folder: pathlib.Path | epath.Path) -> dict[str, str]:
    """The MD5 that Cloud Storage keeps with each object, by name. Objects composed of parts have none."""
    return {
        name: base64.b64decode(facts["md5Hash"]).hex()
        for name, facts in _objects(folder).items()
        if "md5Hash" in facts
    }


def _objects(folder: pathlib.Path | epath.Path) -> dict[str, dict[str, Any]]:
    """What Cloud Storage knows about each object, by name: a listing, without reading the objects."""
    import fsspec  # gcsfs depends on it

    found = fsspec.filesystem("gcs").find(os.fspath(folder), detail=True)
    start = len(os.fspath(folder).removeprefix("gs://")) + 1
    return {name[start:]: facts for name, facts in found.items()}


def file_stamp(paths: Iterable[pathlib.Path]) -> str:
    """A digest that changes if a file is added, removed, renamed or written."""
    facts = []
    for path in paths:
        stat = path.stat()
        facts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return digest("\n".join(facts))
