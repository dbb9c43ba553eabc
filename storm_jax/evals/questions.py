"""A row of a benchmark on its way: question, prompt, answer, and what was made of it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from storm_jax.media.media import Media
from storm_jax.text.sample import PLACEHOLDER, Caption, Sample, Turn

MISSING = "missing"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A row of a benchmark.

    Attributes:
      id: unique in its split; predictions are kept by it.
      video: the video it is about; questions about one video are not independent of each other.
      media: where that is, or should be, on disk.
      text: the question without its options.
      options: the options without letters; () = the answer is free text.
      answer: a letter, or the text of a free answer; None where the key is not public, and "" where no
        option is right, which no reply can match.
      groups: the group of each dimension that is reported, such as {"duration": "short"}.
      lines: the options with their letters, where the files have them so.
      subtitles: the file of the video's subtitles, None where there is none.
      captions: the subtitles that are shown with the frames; None where they are not asked for.
      guess: accuracy of guessing, where that is not one in as many as there are options.
      extra: fields that only this benchmark uses.
    """

    id: str
    video: str
    media: Media
    text: str
    options: tuple[str, ...]
    answer: str | None
    groups: Mapping[str, str]
    lines: tuple[str, ...] = ()
    subtitles: pathlib.Path | None = None
    captions: tuple[Caption, ...] | None = None
    guess: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return string.ascii_uppercase[: len(self.options)]

    @property
    def lettered(self) -> dict[str, str]:
        """The options by their letters."""
        return dict(zip(self.letters, self.options, strict=True))

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        if self.guess is not None:
            return self.guess
        return 1 / len(self.options) if self.options else 0.0

    def listed(self, form: str) -> str:
        """The options, a line each, such as "({letter}) {option}"."""
        return "\n".join(form.format(letter=x, option=text) for x, text in self.lettered.items())


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is said to the model: a system turn ("" = the run's own), the user's turn, which holds
    `<video>` where the video stands, and the beginning of the answer."""

    user: str
    system: str = ""
    opening: str = ""

    def sample(self, question: Question) -> Sample:
        """The question as it is put to the model."""
        turns = [Turn("user", self.user)]
        if self.system:
            turns.insert(0, Turn("system", self.system))
        return Sample(
            id=question.id,
            turns=tuple(turns),
            media=(question.media,),
            extra={},
            opening=self.opening,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model replied to a question, or why it could not.

    Attributes:
      error, cause: as in `Prediction`; the cause "missing" is a video that is not there.
      visual_tokens, seconds: what the reply cost.
    """

    reply: str = ""
    error: str = ""
    cause: str = ""
    visual_tokens: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A question, its answer, and what the parser made of it."""

    question: Question
    answer: Answer
    parsed: str | None

    @property
    def right(self) -> bool:
        return self.parsed is not None and self.parsed == self.question.answer

    @property
    def status(self) -> str:
        """One of "parsed", "unparsed", "missing" and "failed"."""
        if self.answer.error:
            return MISSING if self.answer.cause == MISSING else "failed"
        return "unparsed" if self.parsed is None else "parsed"


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of the first option that is `answer`, "" where none is."""
    options = list(options)
    return string.ascii_uppercase[options.index(answer)] if answer in options else ""


def without_letter(line: str) -> str:
    """An option without the letter that the files have before it."""
    return re.sub(r"^\s*\(?[A-Z][.):]\s*", "", line)


def without_placeholders(text: str) -> str:
    """A text of a benchmark without what would be taken for a medium."""
    return PLACEHOLDER.sub("", text)
