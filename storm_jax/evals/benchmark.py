"""What a benchmark is: questions from its files, prompts, parsers, and what was published about it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.evals.questions import Prompt, Question, Row
from storm_jax.text.sample import Caption


class BenchmarkError(ValueError):
    """A benchmark whose files cannot be used, or that has not what is asked of it."""


# `(reply, question) ->` a letter, or for a free answer its text; None = the reply gives none.
Parser = Callable[[str, Question], str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
      name, title: on the command line and in print.
      source: where its files come from.
      splits: by name; the first is the default.
      load: `(folder, split) ->` its questions.
      prompts: by the name of the style; the first is the default.
      parsers: by name; that of a prompt style without one is the first.
      headline: the name that the authors give to their main figure.
      headline_over: the dimension whose groups it is the mean of; "" = the mean over all questions.
      captions: `(question, times of its frames) ->` the subtitles that are shown then, without words
        that stand for media; None where the benchmark has none.
      captions_among_frames: whether they stand there, and not in the prompt.
      ceiling: `(question, compression) ->` the best expected of a model without temporal mixing.
      submit: `(split, rows, folder) ->` the files written for the authors' own scorers.
    """

    name: str
    title: str
    source: str
    splits: Mapping[str, Split]
    load: Callable[[pathlib.Path, str], list[Question]]
    prompts: Mapping[str, Callable[[Question], Prompt]]
    parsers: Mapping[str, Parser]
    headline: str = "accuracy"
    headline_over: str = ""
    captions: Callable[[Question, np.ndarray], list[Caption]] | None = None
    captions_among_frames: bool = False
    ceiling: Callable[[Question, CompressionConfig], float | None] | None = None
    submit: Callable[[str, Sequence[Row], pathlib.Path], list[pathlib.Path]] | None = None

    def pick_split(self, name: str) -> str:
        """The name, or that of the default where it is empty.

        Raises:
          BenchmarkError: naming those there are.
        """
        return self._pick("split", name, self.splits)

    def pick_prompt(self, name: str) -> str:
        """As `pick_split`, of the prompt styles."""
        return self._pick("prompt_style", name, self.prompts)

    def pick_parser(self, name: str, style: str) -> str:
        """As `pick_split`, of the parsers; the default is that of the prompt style."""
        return self._pick("parser", name or (style if style in self.parsers else ""), self.parsers)

    def _pick(self, flag: str, name: str, known: Mapping) -> str:
        if name and name not in known:
            raise BenchmarkError(f"--{flag}={name}: {self.title} has {', '.join(known)}")
        return name or next(iter(known))

    def questions(self, folder: str | pathlib.Path, split: str) -> list[Question]:
        """The questions of a split, in the order of its files.

        Raises:
          BenchmarkError: when there are none, a row is not as it should be, or ids repeat.
        """
        root = pathlib.Path(folder)
        if not root.is_dir():
            raise BenchmarkError(f"--data_root={root} is no folder; {self.source}")
        try:
            questions = self.load(root, split)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise BenchmarkError(
                f"{root}: a row is not as {self.title} has it: {type(error).__name__} {error}"
            ) from error
        if not questions:
            raise BenchmarkError(f"{root} holds no question of {self.title} {split}")
        repeated = [i for i, count in Counter(q.id for q in questions).items() if count > 1]
        if repeated:
            raise BenchmarkError(f"{root}: the question id {repeated[0]!r} occurs more than once")
        return questions
