"""The samples that cannot be used, in skipped.jsonl."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence

from storm_jax.data.skips import Skip
from storm_jax.files import read_lines, write_lines
from storm_jax.media.reader import LASTING

_SHOWN = 20  # of samples that are found to be unusable at once, those that are shown


class SkipLog:
    """Lists each unusable sample once in skipped.jsonl, and warns of it.

    `lasting` are the causes of media that hung or crashed a worker, by name: they are not tried again.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "skipped.jsonl"
        self._logged: set[tuple[str, str, str]] = set()
        self.lasting: dict[str, str] = {}
        if self._path.exists():
            lines = read_lines(self._path)
            for line in lines:
                self._remember(Skip(**line))
            # A last line that was cut off goes.
            write_lines(self._path, lines)

    def write(self, skips: Sequence[Skip]) -> None:
        new = [skip for skip in skips if self._remember(skip)]
        if not new:
            return
        for skip in new[:_SHOWN]:
            logging.warning("skipped (%s): %s: %s", skip.cause, skip.where, skip.message)
        if len(new) > _SHOWN:
            logging.warning("and %d more: %s", len(new) - _SHOWN, self._path)
        with self._path.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in new)

    def _remember(self, skip: Skip) -> bool:
        """Whether it is new."""
        if skip.cause in LASTING:
            self.lasting[skip.file] = skip.cause
        key = (skip.source, skip.where, skip.cause)
        known = key in self._logged
        self._logged.add(key)
        return not known
