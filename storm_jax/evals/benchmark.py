"""Questions, replies, and benchmarks: how to load questions, ask them, and parse what a model replies."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.inference.prediction import Prediction
from storm_jax.media.media import Media
from storm_jax.text.sample import PLACEHOLDER, Caption, Sample, Turn

MISSING = "missing"  # cause of a prediction whose video does not exist


class BenchmarkError(ValueError):
    """Files of a benchmark that cannot be used, or an option that it does not support."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """When a model is asked each second whether it is time to answer a question.

    Attributes:
      begin, end: the first time is a second after `begin`, the last one at `end`, in seconds of the video.
      poll: what is asked; yes ends it.
    """

    begin: int
    end: int
    poll: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a benchmark.

    Attributes:
      id: unique within its split; predictions refer to it.
      video: the video it is about. Questions about one video are not statistically independent.
      media: the file, which need not exist. It is asked at `media.end`, or at the end of the file.
      asked_at: when it is asked, in seconds of the video, if the benchmark says so; also of clips that were cut there.
      text: the question without its options.
      options: without letters; () if the answer is free text.
      answer: the letter of the right option, or the text of a free answer. None if the answer is not
        public; "" if no option is right, so that no reply counts as right.
      groups: the reported group of each dimension, e.g. {"duration": "short"}.
      lines: the options with their letters, if the benchmark's files list them so.
      subtitles: the video's subtitle file, or None.
      captions: subtitles to show with the sampled frames; None if subtitles are not requested.
      guess: accuracy of guessing, if it is not 1 / number of options.
      watch: how the model is asked for the right time to answer; None if it is asked at once.
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
    asked_at: float | None = None
    watch: Watch | None = None
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


@dataclasses.dataclass(frozen=True)
class ScoredReply:
    """A question, the model's prediction, and what the parser read in it.

    Attributes:
      parsed: a letter of the question's, or the text of a free answer; None if there is neither.
    """

    question: Question
    prediction: Prediction
    parsed: str | None

    @property
    def right(self) -> bool:
        return self.parsed is not None and self.parsed == self.question.answer

    @property
    def status(self) -> str:
        """One of "parsed", "unparsed", "missing" and "failed"."""
        if self.prediction.error:
            return MISSING if self.prediction.cause == MISSING else "failed"
        return "unparsed" if self.parsed is None else "parsed"


def parse_replies(
    questions: Sequence[Question], predictions: Mapping[str, Prediction], parse: Parser
) -> list[ScoredReply]:
    """Parses the prediction of each question, in the order of the questions; those without a prediction
    were not asked and are left out."""
    replies = []
    for question in questions:
        prediction = predictions.get(question.id)
        if prediction is None:
            continue
        parsed = None if prediction.error else parse(prediction.text, question)
        if question.options and parsed not in question.lettered:
            parsed = None
        replies.append(ScoredReply(question, prediction, parsed))
    return replies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A split of a benchmark.

    Attributes:
      rows: published number of questions; 0 if it varies.
      groups: published number of questions per group, by dimension.
      max_new_tokens: maximum length of a reply.
      judged: whether replies are free text that a judge model scores.
    """

    rows: int
    groups: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    max_new_tokens: int = 16
    judged: bool = False

    def sorted_groups(self, dimension: str, groups: Iterable[str]) -> list[str]:
        """Sorts groups in published order; unknown ones come last."""
        places = {name: place for place, name in enumerate(self.groups.get(dimension, ()))}
        return sorted(groups, key=lambda group: (places.get(group, len(places)), group))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
      name, title: name on the command line and in print.
      source: where to get its files.
      splits: by name; the first is the default.
      load: `(folder, split) ->` its questions.
      prompts: prompt styles by name; the first is the default.
      parsers: by name. Each prompt style uses the parser of its name, or else the first.
      headline: the authors' name for their main metric.
      headline_over: the dimensions whose groups the main metric averages, outermost first; () = mean over
        questions.
      captions: `(question, times of its frames) ->` the subtitles shown at these times, without
        placeholders; None if the benchmark has no subtitles.
      ceiling: `(question, compression) ->` the best expected accuracy without temporal mixing.
      submit: `(split, replies, folder) ->` the files written for the authors' own scorers.
      is_streaming: whether questions are asked while a video is watched, unless another mode is chosen.
    """

    name: str
    title: str
    source: str
    splits: Mapping[str, Split]
    load: Callable[[pathlib.Path, str], list[Question]]
    prompts: Mapping[str, Callable[[Question], Sample]]
    parsers: Mapping[str, Parser]
    headline: str = "accuracy"
    headline_over: tuple[str, ...] = ()
    captions: Callable[[Question, np.ndarray], list[Caption]] | None = None
    ceiling: Callable[[Question, CompressionConfig], float | None] | None = None
    submit: Callable[[str, Sequence[ScoredReply], pathlib.Path], list[pathlib.Path]] | None = None
    is_streaming: bool = False

    def pick_split(self, name: str) -> str:
        """Returns `name`, or the default split if it is empty.

        Raises:
          BenchmarkError: if there is no such split; the message lists those that exist.
        """
        return self._pick("split", name, self.splits)

    def pick_prompt(self, name: str) -> str:
        """Like `pick_split`, for prompt styles."""
        return self._pick("prompt_style", name, self.prompts)

    def pick_parser(self, name: str, style: str) -> str:
        """Like `pick_split`, for parsers; the default is that of the prompt style."""
        return self._pick("parser", name or (style if style in self.parsers else ""), self.parsers)

    def _pick(self, flag: str, name: str, known: Mapping) -> str:
        if name and name not in known:
            raise BenchmarkError(f"--{flag}={name}: {self.title} has {', '.join(known)}")
        return name or next(iter(known))

    def questions(self, folder: str | pathlib.Path, split: str) -> list[Question]:
        """Loads the questions of a split, in the order of its files.

        Raises:
          BenchmarkError: if there are none, a row is malformed, or ids repeat.
        """
        root = pathlib.Path(folder)
        if not root.is_dir():
            raise BenchmarkError(f"--data_root={root} is not a folder; {self.source}")
        try:
            questions = self.load(root, split)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise BenchmarkError(
                f"{root}: a row does not have the fields of {self.title}: "
                f"{type(error).__name__} {error}"
            ) from error
        if not questions:
            raise BenchmarkError(f"{root} contains no questions of {self.title} {split}")
        repeated = [i for i, count in Counter(q.id for q in questions).items() if count > 1]
        if repeated:
            raise BenchmarkError(f"{root}: the question id {repeated[0]!r} occurs more than once")
        return questions


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
