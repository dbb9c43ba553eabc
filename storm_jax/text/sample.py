"""A sample: a conversation about media, and the error for samples that cannot be used."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from storm_jax.media.media import Media

PLACEHOLDER = re.compile("<image>|<video>")


class SampleError(ValueError):
    """A sample that cannot be used; `cause` is the category that skips are counted by."""

    def __init__(self, sample_id: str, cause: str, message: str):
        super().__init__(f"sample {sample_id!r}: {message}")
        self.sample_id, self.cause = sample_id, cause


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
      role: "system", "user" or "assistant".
      trained: whether an answer carries loss.
    """

    role: str
    text: str
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Caption:
    """Text placed among a video's tokens, after the frames shown up to `time` (seconds)."""

    time: float
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation about media.

    Attributes:
      media: the n-th placeholder of the user turns refers to the n-th medium. Without media, and in other
        turns, `<image>` and `<video>` are text.
      extra: all other fields of the record, such as a benchmark's family or options.
      ignored: `extra`, and unknown fields of messages and media, such as "video.detail".
      opening: forced start of the answer, if the sample ends with a question.
      captions: captions of the only medium, sorted by time.
    """

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]
    extra: Mapping[str, Any]
    ignored: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    opening: str = ""
    captions: tuple[Caption, ...] = ()

    def placeholders(self) -> int:
        """Number of placeholders in the text."""
        if not self.media:
            return 0
        return sum(len(PLACEHOLDER.findall(t.text)) for t in self.turns if t.role == "user")

    def prompt(self) -> Sample:
        """Returns the sample without its last answer."""
        return dataclasses.replace(self, turns=self.turns[:-1])

    def answer(self) -> str:
        """Returns the text of the last turn."""
        return self.turns[-1].text
