"""LLaVA-style JSON: a list of `{id, image | video, conversations}` with media beside the file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

PLACEHOLDER = re.compile("<image>|<video>")

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip


class DataError(ValueError):
    """A dataset that cannot be used."""


class SampleError(ValueError):
    """A sample that cannot be used; `cause` is the word it is counted under."""

    def __init__(self, sample_id: str, cause: str, message: str):
        super().__init__(f"sample {sample_id!r}: {message}")
        self.sample_id, self.cause = sample_id, cause


@dataclasses.dataclass(frozen=True)
class Media:
    """One image or video file."""

    kind: str
    path: pathlib.Path

    def num_frames(self, video_frames: int) -> int:
        return 1 if self.kind == "image" else video_frames


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message; `role` is "system", "user" or "assistant"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation about media. The n-th placeholder of its text stands for the n-th of `media`.

    `extra` keeps the record's other fields (a benchmark's family or options)."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]
    extra: Mapping[str, Any]

    def prompt(self) -> Sample:
        """The sample up to its last answer, which is left out."""
        return dataclasses.replace(self, turns=self.turns[:-1])

    def answer(self) -> str:
        return self.turns[-1].text


def read_records(path: str | pathlib.Path) -> list[Any]:
    """The records of a LLaVA JSON file.

    Raises:
      DataError: when the file is missing, is not JSON or is not a list.
    """
    path = pathlib.Path(path)
    try:
        records = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: data.train and data.val name LLaVA JSON files"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} must be a non-empty list of samples")
    return records


def parse_record(record: Any, media_root: pathlib.Path, index: int) -> Sample:
    """One record of a LLaVA JSON file as a Sample.

    Raises:
      SampleError: with cause "malformed", "empty_conversation" or "placeholder".
    """
    if not isinstance(record, Mapping):
        raise SampleError(str(index), "malformed", f"record {index} is not an object")
    sample_id = str(record.get("id", index))
    turns = _parse_turns(sample_id, record.get("conversations"))
    files = {kind: _parse_files(sample_id, kind, record.get(kind)) for kind in ("image", "video")}
    placeholders = [name.strip("<>") for turn in turns for name in PLACEHOLDER.findall(turn.text)]
    media = _in_text_order(sample_id, files, placeholders, media_root)
    known = ("id", "image", "video", "conversations")
    return Sample(
        sample_id, turns, media, {key: v for key, v in record.items() if key not in known}
    )


def _parse_files(sample_id: str, kind: str, value: Any) -> list[str]:
    names = ([value] if isinstance(value, str) else value) or []
    if names == [""]:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise SampleError(
            sample_id, "malformed", f"{kind}={value!r} must be a file name or a list of them"
        )
    return names


def _in_text_order(
    sample_id: str, files: Mapping[str, list[str]], placeholders: list[str], root: pathlib.Path
) -> tuple[Media, ...]:
    """One medium per placeholder. With one kind of file, either placeholder may stand for it (some
    data sets write <image> for videos); with both, each takes the next file of its kind."""
    present = [kind for kind, names in files.items() if names]
    kinds = present * len(placeholders) if len(present) == 1 else placeholders
    if Counter(kinds) != Counter({kind: len(names) for kind, names in files.items() if names}):
        raise SampleError(
            sample_id,
            "placeholder",
            f"{len(placeholders)} placeholders ({', '.join(placeholders)}) in the text for "
            f"{len(files['image'])} images and {len(files['video'])} videos",
        )
    left = {kind: iter(names) for kind, names in files.items()}
    return tuple(Media(kind, root / next(left[kind])) for kind in kinds)


def _parse_turns(sample_id: str, conversations: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, Sequence) or not conversations:
        raise SampleError(sample_id, "empty_conversation", "conversations is missing or empty")
    turns = []
    for turn in conversations:
        try:
            role, text = _ROLES[turn["from"]], turn["value"]
            text.encode()  # half of a surrogate pair cannot be tokenised
            turns.append(Turn(role, text))
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise SampleError(
                sample_id,
                "malformed",
                f"turn {turn!r} must be {{'from': 'human' or 'gpt', 'value': text}}",
            ) from None
    roles = [turn.role for turn in turns]
    if roles[0] == "system":
        roles = roles[1:]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise SampleError(
            sample_id, "malformed", f"turns must alternate human and gpt, found {', '.join(roles)}"
        )
    if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise SampleError(sample_id, "empty_conversation", "an answer is empty")
    return tuple(turns)
