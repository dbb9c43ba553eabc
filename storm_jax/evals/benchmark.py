"""A benchmark: how to load its questions, ask them and parse replies, and its published counts."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.evals.questions import BenchmarkError, Parser, Question
from storm_jax.evals.replies import ScoredReply
from storm_jax.text.sample import Caption, Sample


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
      headline_over: the dimension whose groups the main metric averages; "" = mean over questions.
      captions: `(question, times of its frames) ->` the subtitles shown at these times, without
        placeholders; None if the benchmark has no subtitles.
      ceiling: `(question, compression) ->` the best expected accuracy without temporal mixing.
      submit: `(split, replies, folder) ->` the files written for the authors' own scorers.
    """

    name: str
    title: str
    source: str
    splits: Mapping[str, Split]
    load: Callable[[pathlib.Path, str], list[Question]]
    prompts: Mapping[str, Callable[[Question], Sample]]
    parsers: Mapping[str, Parser]
    headline: str = "accuracy"
    headline_over: str = ""
    captions: Callable[[Question, np.ndarray], list[Caption]] | None = None
    ceiling: Callable[[Question, CompressionConfig], float | None] | None = None
    submit: Callable[[str, Sequence[ScoredReply], pathlib.Path], list[pathlib.Path]] | None = None

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
