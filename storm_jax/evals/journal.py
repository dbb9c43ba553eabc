"""Answers as they come, so that a killed evaluation goes on where it stopped.

FOLDER/settings.json       what the answers depend on
FOLDER/answers.I-of-N.jsonl    those of process I of N, appended and flushed one by one
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from storm_jax.evals.predictions import answer_of
from storm_jax.evals.questions import Answer
from storm_jax.files import read_lines, write_atomically
from storm_jax.run import RunError


class Journal:
    """The answers of a folder; this process writes those of its share."""

    def __init__(self, folder: pathlib.Path, share: tuple[int, int] = (0, 1)):
        self.folder = folder
        self._path = folder / f"answers.{share[0]}-of-{share[1]}.jsonl"

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or checks that the answers in it are of the same settings.

        Raises:
          RunError: naming what differs; nothing is overwritten.
        """
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            there = json.loads(path.read_text())
            names = sorted({*there, *settings})
            changed = [
                f"{name}: {there.get(name)!r} there, {settings.get(name)!r} now"
                for name in names
                if there.get(name) != settings.get(name)
            ]
            if changed:
                listed = "\n  ".join(changed)
                raise RunError(
                    f"{self.folder} holds answers of other settings:\n  {listed}\n"
                    f"Remove the folder to ask again"
                )
        else:
            write_atomically(path, json.dumps(settings, indent=2) + "\n")

    def answers(self) -> dict[str, Answer]:
        """All answers by question, of every process; of one that failed and was asked again, the reply."""
        found: dict[str, Answer] = {}
        for path in sorted(self.folder.glob("answers.*.jsonl")):
            for line in read_lines(path):
                answer = answer_of(line)
                if line["id"] not in found or found[line["id"]].error:
                    found[line["id"]] = answer
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[_Writer]:
        """Appends answers; a line that a killed process left unfinished is taken away first.

        Raises:
          RunError: when another process is writing them.
        """
        with self._path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is answering {self._path}: wait for it, or give each its --share"
                ) from error
            except OSError:  # a file system without locks
                pass
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            yield _Writer(file)


class _Writer:
    def __init__(self, file: Any):
        self._file = file

    def add(self, identity: str, answer: Answer) -> None:
        line = {"id": identity, **dataclasses.asdict(answer)}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
