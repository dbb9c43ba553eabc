"""What a benchmark is: questions from its files, prompts and parsers by style, and published counts."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.data.sample import PLACEHOLDER, Caption, Media, Sample, Turn


class BenchmarkError(ValueError):
    """A benchmark whose files cannot be used, or that has not what is asked of it."""


@dataclasses.dataclass(frozen=True)
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
      extra: fields that prompts and submissions of this benchmark use.
    """

    id: str
    video: str
    media: Media
    text: str
    options: tuple[str, ...]
    answer: str | None
    groups: Mapping[str, str]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return string.ascii_uppercase[: len(self.options)]

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return self.extra.get("chance", 1 / len(self.options) if self.options else 0.0)

    def listed(self, form: str) -> str:
        """The options, a line each, such as "({letter}) {option}"."""
        pairs = zip(self.letters, self.options, strict=True)
        return "\n".join(form.format(letter=letter, option=option) for letter, option in pairs)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is said to the model: a system turn ("" = the run's own), the user's turn, which holds
    `<video>` where the video stands, the beginning of the answer, and captions among the frames."""

    user: str
    system: str = ""
    opening: str = ""
    captions: tuple[Caption, ...] = ()

    def sample(self, question: Question) -> Sample:
        """The question as it is put to the model."""
        turns = [Turn("user", self.user)]
        if self.system:
            turns.insert(0, Turn("system", self.system))
        return Sample(question.id, tuple(turns), (question.media,), {}, self.opening, self.captions)


# `(question, subtitles)`: those that are shown with the frames; None where they are not asked for.
PromptFunction = Callable[[Question, Sequence[Caption] | None], Prompt]
# `(reply, question) ->` a letter, or for a free answer its text; None = the reply gives none.
Parser = Callable[[str, Question], str | None]


@dataclasses.dataclass(frozen=True)
class Style:
    """A prompt, and the parser that goes with it."""

    prompt: PromptFunction
    parse: Parser


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of a benchmark.

    Attributes:
      rows: how many questions were published; 0 where that is up to the user.
      groups: the published number of questions per group, by dimension.
      max_new_tokens: how long a reply may be.
      judged: whether replies are free texts that a judge scores.
    """

    rows: int
    groups: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    max_new_tokens: int = 16
    judged: bool = False

    def sorted_groups(self, dimension: str, groups: Iterable[str]) -> list[str]:
        """Groups in the order in which they were published, then others."""
        places = {name: place for place, name in enumerate(self.groups.get(dimension, ()))}
        return sorted(groups, key=lambda group: (places.get(group, len(places)), group))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      name, title: on the command line and in print.
      source: where its files come from.
      splits: by name; the first is the default.
      load: `(folder, split) ->` its questions.
      styles: by the name of the prompt style; the first is the default.
      headline: the name that the authors give to their main figure.
      headline_over: the dimension whose groups it is the mean of; "" = the mean over all questions.
      subtitles: `(question, times of its frames) ->` the subtitles that are shown then, without words
        that stand for media; None where the benchmark has none.
      ceiling: `(question, compression) ->` the best expected of a model without temporal mixing.
      submit: `(split, rows, folder) ->` the files written for the authors' own scorers; each row is a
        question, the reply ("" = none) and what was parsed from it.
    """

    name: str
    title: str
    source: str
    splits: Mapping[str, Split]
    load: Callable[[pathlib.Path, str], list[Question]]
    styles: Mapping[str, Style]
    headline: str = "accuracy"
    headline_over: str = ""
    subtitles: Callable[[Question, np.ndarray], list[Caption]] | None = None
    ceiling: Callable[[Question, CompressionConfig], float | None] | None = None
    submit: Callable[[str, Sequence[Submitted], pathlib.Path], list[pathlib.Path]] | None = None

    def style(self, name: str) -> Style:
        """The style of that name, "" = the default.

        Raises:
          BenchmarkError: naming those there are.
        """
        if not name:
            return next(iter(self.styles.values()))
        if name not in self.styles:
            raise BenchmarkError(
                f"--prompt_style={name}: {self.title} has {', '.join(self.styles)}"
            )
        return self.styles[name]

    def split(self, name: str) -> str:
        """The split of that name, "" = the default.

        Raises:
          BenchmarkError: naming those there are.
        """
        if name and name not in self.splits:
            raise BenchmarkError(f"--split={name}: {self.title} has {', '.join(self.splits)}")
        return name or next(iter(self.splits))

    def questions(self, folder: str | pathlib.Path, split: str) -> list[Question]:
        """The questions of a split, in the order of its files.

        Raises:
          BenchmarkError: when there are none, or ids repeat.
        """
        root = pathlib.Path(folder)
        if not root.is_dir():
            raise BenchmarkError(f"--data_root={root} is no folder; {self.source}")
        try:
            questions = self.load(root, split)
        except (KeyError, TypeError, IndexError) as error:
            raise BenchmarkError(
                f"{root}: a row is not as {self.title} has it: {type(error).__name__} {error}"
            ) from error
        if not questions:
            raise BenchmarkError(f"{root} holds no question of {self.title} {split}".rstrip())
        repeated = [i for i, count in Counter(q.id for q in questions).items() if count > 1]
        if repeated:
            raise BenchmarkError(f"{root}: the question id {repeated[0]!r} occurs more than once")
        return questions


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A row of a submission."""

    question: Question
    reply: str
    parsed: str | None


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of the first option that is `answer`, "" where none is."""
    options = list(options)
    return string.ascii_uppercase[options.index(answer)] if answer in options else ""


def without_placeholders(text: str) -> str:
    """A text of a benchmark without what would be taken for a medium."""
    return PLACEHOLDER.sub("", text)


def normalise(text: str) -> str:
    """Compatible characters folded, lower case, no punctuation, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())
