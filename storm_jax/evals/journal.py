"""Predictions and thumbnails, saved as they come, so that an interrupted evaluation resumes.

FOLDER/settings.json             what the predictions depend on
FOLDER/answers.I-of-N.jsonl      predictions of shard I of N, appended and flushed one by one
FOLDER/thumbnails.I-of-N.jsonl   a few small frames of each video (see `report.thumbnails`)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from storm_jax.evals.predictions import from_fields, to_fields
from storm_jax.evals.report.thumbnails import Thumbnails
from storm_jax.files import read_lines, to_line, write_atomically
from storm_jax.inference.prediction import Prediction
from storm_jax.run import RunError


class Journal:
    """The predictions of a folder. This process writes those of its shard (index, count)."""

    def __init__(self, folder: pathlib.Path, shard: tuple[int, int] = (0, 1)):
        self.folder = folder
        suffix = f"{shard[0]}-of-{shard[1]}.jsonl"
        self._path = folder / f"answers.{suffix}"
        self._thumbnails = folder / f"thumbnails.{suffix}"

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Creates the folder, or checks that its predictions were made with the same settings.

        Raises:
          RunError: if they were not; the message lists the differences, and nothing is overwritten.
        """
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            saved = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{path} is damaged, so that the settings of the answers are unknown: remove "
                f"{self.folder} to ask again"
            ) from error
        changed = [
            f"{name}: {saved.get(name)!r} there, {settings.get(name)!r} now"
            for name in sorted({*saved, *settings})
            if saved.get(name) != settings.get(name)
        ]
        if changed:
            listed = "\n  ".join(changed)
            raise RunError(
                f"{self.folder} contains answers made with other settings:\n  {listed}\n"
                f"Remove the folder to ask again"
            )

    def predictions(self) -> dict[str, Prediction]:
        """Predictions of all shards by question id. If a failure was retried, the reply is returned.

        A question whose line is damaged has none, and is asked again.
        """
        found: dict[str, Prediction] = {}
        for path in sorted(self.folder.glob("answers.*.jsonl")):
            for question_id, prediction in read_lines(path, _answer):
                if question_id not in found or found[question_id].error:
                    found[question_id] = prediction
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[JournalWriter]:
        """Opens the files of this shard for appending; an unfinished last line is removed first.

        Raises:
          RunError: if another process is writing them.
        """
        with self._path.open("a+b") as answers, self._thumbnails.open("a+b") as thumbnails:
            try:
                fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is writing {self._path}: wait for it, or use --share"
                ) from error
            except OSError:  # a file system without locks
                pass
            for file in (answers, thumbnails):
                _remove_unfinished_line(file)
            yield JournalWriter(answers, thumbnails)


class JournalWriter:
    """Appends to the files of one shard."""

    def __init__(self, answers: BinaryIO, thumbnails: BinaryIO):
        self._answers, self._thumbnails = answers, thumbnails

    def add(self, question_id: str, prediction: Prediction) -> None:
        _append(self._answers, {"id": question_id, **to_fields(prediction)})

    def add_thumbnails(self, question_ids: Sequence[str], thumbnails: Thumbnails) -> None:
        """Saves the thumbnails of a video for all questions about it."""
        _append(self._thumbnails, {"ids": list(question_ids), **thumbnails.to_fields()})


def _answer(line: dict[str, Any]) -> tuple[str, Prediction]:
    if not isinstance(line["id"], str) or not isinstance(line["reply"], str):
        raise TypeError("id and reply must be text")
    return line["id"], from_fields(line)


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    file.write(to_line(line).encode())
    file.flush()


def _remove_unfinished_line(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
