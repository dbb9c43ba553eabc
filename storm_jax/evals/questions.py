"""Questions of a benchmark, and how they become samples for a model."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from storm_jax.media.media import Media
from storm_jax.text.sample import PLACEHOLDER, Caption, Sample, Turn


class BenchmarkError(ValueError):
    """Files of a benchmark that cannot be used, or an option that it does not support."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a benchmark.

    Attributes:
      id: unique within its split; predictions refer to it.
      video: the video it is about. Questions about one video are not statistically independent.
      media: the file, which need not exist.
      text: the question without its options.
      options: without letters; () if the answer is free text.
      answer: the letter of the right option, or the text of a free answer. None if the answer is not
        public; "" if no option is right, so that no reply counts as right.
      groups: the reported group of each dimension, e.g. {"duration": "short"}.
      lines: the options with their letters, if the benchmark's files list them so.
      subtitles: the video's subtitle file, or None.
      captions: subtitles to show with the sampled frames; None if subtitles are not requested.
      guess: accuracy of guessing, if it is not 1 / number of options.
      extra: fields used by this benchmark only.
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
        """The options by letter."""
        return dict(zip(self.letters, self.options, strict=True))

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        if self.guess is not None:
            return self.guess
        return 1 / len(self.options) if self.options else 0.0

    def list_options(self, template: str) -> str:
        """The options, one per line, each formatted by a template like "({letter}) {option}"."""
        lines = (template.format(letter=x, option=text) for x, text in self.lettered.items())
        return "\n".join(lines)

    def sample(
        self,
        user: str,
        *,
        system: str = "",
        opening: str = "",
        captions: Sequence[Caption] = (),
    ) -> Sample:
        """The question as a sample for a model.

        Args:
          user: the user's turn, with `<video>` where the video goes.
          system: the system turn; "" uses that of the run.
          opening: the beginning of the answer.
          captions: text to insert among the video's tokens.
        """
        turns = [Turn("user", user)]
        if system:
            turns.insert(0, Turn("system", system))
        return Sample(
            id=self.id,
            turns=tuple(turns),
            media=(self.media,),
            extra={},
            opening=opening,
            captions=tuple(captions),
        )


# `(reply, question) ->` the letter that a reply chooses, or the text of a free answer; None if unparseable.
Parser = Callable[[str, Question], str | None]


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of the first option equal to `answer`, or ""."""
    options = list(options)
    return string.ascii_uppercase[options.index(answer)] if answer in options else ""


def without_letter(line: str) -> str:
    """An option without its leading letter."""
    return re.sub(r"^\s*\(?[A-Z][.):]\s*", "", line)


def without_placeholders(text: str) -> str:
    """A text without `<image>` and `<video>`, which would be taken for media."""
    return PLACEHOLDER.sub("", text)
