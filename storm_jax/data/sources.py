"""LLaVA-style JSON: a list of `{id, image | video, conversations}` with media beside the file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

PLACEHOLDER = re.compile("<image>|<video>")

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip


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
      ValueError: when the file is missing, is not JSON or is not a list.
    """
    path = pathlib.Path(path)
    try:
        records = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: data.train and data.val name LLaVA JSON files"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must be a non-empty list of samples")
    return records


def parse_record(record: Any, media_root: pathlib.Path, index: int) -> Sample:
    """One record of a LLaVA JSON file as a Sample.

    Raises:
      SampleError: with cause "malformed", "empty_conversation" or "placeholder".
    """
    if not isinstance(record, Mapping):
        raise SampleError(str(index), "malformed", f"record {index} is not an object")
    sample_id = str(record.get("id", index))
    media = tuple(
        Media(kind, media_root / str(name))
        for kind in ("image", "video")
        if record.get(kind)
        for name in ([record[kind]] if isinstance(record[kind], str) else record[kind])
    )
    turns = _parse_turns(sample_id, record.get("conversations"))
    placeholders = sum(len(PLACEHOLDER.findall(turn.text)) for turn in turns)
    if placeholders != len(media):
        raise SampleError(
            sample_id,
            "placeholder",
            f"{placeholders} <image>/<video> placeholders in the text and {len(media)} media files",
        )
    known = ("id", "image", "video", "conversations")
    return Sample(
        sample_id, turns, media, {key: v for key, v in record.items() if key not in known}
    )


def _parse_turns(sample_id: str, conversations: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, Sequence) or not conversations:
        raise SampleError(sample_id, "empty_conversation", "conversations is missing or empty")
    turns = []
    for turn in conversations:
        try:
            turns.append(Turn(_ROLES[turn["from"]], str(turn["value"])))
        except (KeyError, TypeError):
            raise SampleError(
                sample_id,
                "malformed",
                f"turn {turn!r} must be {{'from': 'human' or 'gpt', 'value': text}}",
            ) from None
    roles = [turn.role for turn in turns if turn.role != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise SampleError(
            sample_id, "malformed", f"turns must alternate human and gpt, found {', '.join(roles)}"
        )
    if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise SampleError(sample_id, "empty_conversation", "an answer is empty")
    return tuple(turns)
