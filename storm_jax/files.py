"""Files: JSON lines, writes that are whole or absent, digests."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterable, Mapping
from typing import Any


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is either there whole or not at all."""
    # Processes of several containers may have one number.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    partial.write_text(text)
    partial.rename(path)


def write_lines(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file, whole or not at all."""
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last line cut off by a killed process is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def file_stamp(paths: Iterable[pathlib.Path]) -> str:
    """Changes when a file is added, removed, renamed or written."""
    facts = []
    for path in paths:
        stat = path.stat()
        facts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return digest("\n".join(facts))
