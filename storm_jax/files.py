"""JSON lines, atomic writes, digests."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterable, Mapping
from typing import Any


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is complete or absent, never partial."""
    # Processes in different containers may have the same id.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    partial.write_text(text)
    partial.rename(path)


def write_lines(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file atomically."""
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a JSONL file, without a last line that an interrupted process left incomplete."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


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
