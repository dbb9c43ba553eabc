"""What every benchmark gives the runner: questions in groups, a rule for right answers, chance."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from storm_jax.config import CompressionConfig
from storm_jax.data.sample import Sample


@dataclasses.dataclass(frozen=True)
class Question:
    """A sample that ends with a question.

    Attributes:
      sample: the question and its media.
      answer: the right answer.
      options: the options of a multiple choice, in the order of their letters.
      group: the family or category it is reported under.
    """

    sample: Sample
    answer: str
    options: tuple[str, ...]
    group: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set of questions and how they are scored.

    Attributes:
      name: the folder of its reports.
      questions: in the order of its file.
      chance: accuracy of guessing, by group.
      ceiling: `(group, compression) -> ` the best that a model without temporal mixing can reach,
        None where that is not known.
      is_right: whether a text answers a question.
    """

    name: str
    questions: Sequence[Question]
    chance: Mapping[str, float]
    ceiling: Callable[[str, CompressionConfig], float | None]
    is_right: Callable[[Question, str], bool]


def exact_match(question: Question, text: str) -> bool:
    """Equal but for case, punctuation and white space; for a multiple choice, the right letter, its
    option, or both."""
    said = normalise(text)
    if not question.options:
        return said == normalise(question.answer)
    letter = question.answer.lower()
    option = normalise(question.options[ord(question.answer) - ord("A")])
    return said in (letter, option, f"{letter} {option}")


def normalise(text: str) -> str:
    """Compatible characters folded, lower case, no punctuation, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
