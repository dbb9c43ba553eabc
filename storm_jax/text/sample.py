"""What every source gives: a conversation about media, and the errors of samples that cannot be used."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from storm_jax.media.media import Media

PLACEHOLDER = re.compile("<image>|<video>")


class SampleError(ValueError):
    """A sample that cannot be used; `cause` is the word it is counted under."""

    def __init__(self, sample_id: str, cause: str, message: str):
        super().__init__(f"sample {sample_id!r}: {message}")
        self.sample_id, self.cause = sample_id, cause


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message; `role` is "system", "user" or "assistant"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Caption:
    """Text that stands among the tokens of a video, behind the frames that are shown by `time` (s)."""

    time: float
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation about media. The n-th placeholder of its text stands for the n-th of `media`.

    `extra` keeps the record's other fields (a benchmark's family or options). Where it ends with a
    question, the answer to it begins with `opening`. `captions`, in order of time, are those of its only
    medium."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]
    extra: Mapping[str, Any]
    opening: str = ""
    captions: tuple[Caption, ...] = ()

    def prompt(self) -> Sample:
        """The sample up to its last answer, which is left out."""
        return dataclasses.replace(self, turns=self.turns[:-1])

    def answer(self) -> str:
        return self.turns[-1].text
