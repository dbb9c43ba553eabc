"""JSON lines, atomic writes, digests."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is complete or absent, never partial."""
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


def read_lines(
    path: pathlib.Path, parse: Callable[[dict[str, Any]], Any] = lambda line: line
) -> list[Any]:
    """Reads a JSONL file that `write_lines` or an appending process wrote.

    A last line without its end was left by a process that was killed, and is dropped. Any other line that is
    no JSON object, or that `parse` rejects with a KeyError, TypeError or ValueError, is damaged: it is logged
    and dropped.
    """
    found = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise TypeError("not an object")
            found.append(parse(line))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            logging.warning("%s line %d is damaged and dropped: %r", path, number, error)
    return found


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or an exhausted quota."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


def digest(text: str | bytes) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def file_stamp(paths: Iterable[pathlib.Path]) -> str:
    """A digest that changes if a file is added, removed, renamed or written."""
    facts = []
    for path in paths:
        stat = path.stat()
        facts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return digest("\n".join(facts))
