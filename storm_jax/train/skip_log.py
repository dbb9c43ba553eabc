"""skipped.jsonl: every sample that could not be used, once."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from storm_jax import distributed
from storm_jax.data.skips import Skip
from storm_jax.files import Appender, read_lines, to_line, write_atomically
from storm_jax.media.reader import LASTING

_MAX_WARNINGS = 20  # per call of `write`


class SkipLog:
    """Appends each unusable sample to skipped.jsonl once, and warns about it.

    Every process knows all of them; process 0 writes.

    Attributes:
      lasting_failures: {file: cause} of media that hung or crashed a worker; they are not read again.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "skipped.jsonl"
        self._lines = Appender(self._path)
        self._logged: set[tuple[str, str, str]] = set()
        self.lasting_failures: dict[str, str] = {}
        if self._path.exists():
            skips = read_lines(self._path, _skip_of)
            for skip in skips:
                self._is_new(skip)
            if distributed.is_main():
                kept = map(to_line, map(dataclasses.asdict, skips))  # without damaged lines
                write_atomically(self._path, "".join(kept))

    def write(self, skips: Sequence[Skip]) -> None:
        """Logs those of `skips` that are not in the file yet."""
        new = [skip for skip in skips if self._is_new(skip)]
        if not new or not distributed.is_main():
            return
        for skip in new[:_MAX_WARNINGS]:
            logging.warning("skipped (%s): %s: %s", skip.cause, skip.where, skip.message)
        if len(new) > _MAX_WARNINGS:
            logging.warning("and %d more: %s", len(new) - _MAX_WARNINGS, self._path)
        self._lines.write(to_line(dataclasses.asdict(skip)) for skip in new)

    def _is_new(self, skip: Skip) -> bool:
        """Whether a skip has not been passed before; remembers it."""
        if skip.cause in LASTING:
            self.lasting_failures[skip.file] = skip.cause
        key = (skip.source, skip.where, skip.cause)
        is_new = key not in self._logged
        self._logged.add(key)
        return is_new


def _skip_of(line: dict[str, Any]) -> Skip:
    if not all(isinstance(value, str) for value in line.values()):
        raise TypeError("not all values are text")
    return Skip(**line)
