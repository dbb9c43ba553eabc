"""Replies to figures. Every question counts: one without a video, with a broken one, or with a reply that
gives no letter counts as wrong, and how many there are of each is always said."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import Benchmark, Parser, Split
from storm_jax.evals.questions import MISSING, Answer, Question, Row


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Accuracy of a group of questions; `unanswered` of `total` have no video or a broken one."""

    dimension: str
    group: str
    right: int
    total: int
    unanswered: int
    accuracy: Estimate
    chance: float
    ceiling: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """How many questions were published and are in the files; how many were asked; what became of those.

    Attributes:
      missing, failed: without a video, and whose video or subtitles could not be used.
      causes: of `failed`, by the word each is counted under.
      without_key: without a public answer; those are not scored.
      empty_but_right: empty replies that the parser takes for right ones.
    """

    published: int
    rows: int
    asked: int
    parsed: int
    unparsed: int
    missing: int
    failed: int
    causes: Mapping[str, int]
    without_key: int
    empty_but_right: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What one evaluation found.

    Attributes:
      headline: the authors' main figure, None where no answer is public.
      micro: mean over questions.
      macro: mean over the groups of each dimension.
      visual_tokens, seconds: mean, and median, of the questions that were answered.
    """

    headline_name: str
    headline: Estimate | None
    micro: Estimate | None
    macro: Mapping[str, float]
    groups: Sequence[GroupResult]
    counts: Counts
    visual_tokens: float
    seconds: float


def parse_rows(
    questions: Sequence[Question], answers: Mapping[str, Answer], parse: Parser
) -> list[Row]:
    """Rows in the order of the questions; a question without an answer was not asked, and has none."""
    return [
        parse_row(question, answer, parse)
        for question in questions
        if (answer := answers.get(question.id)) is not None
    ]


def parse_row(question: Question, answer: Answer, parse: Parser) -> Row:
    """The row whose reply gives a letter of the question's, or the text of a free answer, or neither."""
    found = None if answer.error else parse(answer.reply, question)
    return Row(
        question,
        answer,
        None if question.options and found not in question.lettered else found,
    )


def score(
    benchmark: Benchmark,
    split: str,
    rows: Sequence[Row],
    total: int,
    compression: CompressionConfig | None = None,
) -> Scores:
    """Scores the rows that were asked of a split that has `total` in its files; what a judge scores
    counts as without a public answer."""
    published = benchmark.splits[split]
    keyed = [row for row in rows if row.question.answer is not None and not published.judged]
    dimensions = list(dict.fromkeys(name for row in rows for name in row.question.groups))
    answered = [row.answer for row in rows if not row.answer.error]
    groups = _groups(benchmark, published, keyed, dimensions, compression)
    return Scores(
        headline_name=benchmark.headline,
        headline=estimate(keyed, benchmark.headline_over) if keyed else None,
        micro=estimate(keyed, "") if keyed else None,
        macro={
            dimension: float(
                np.mean([g.accuracy.value for g in groups if g.dimension == dimension])
            )
            for dimension in dimensions
            if keyed
        },
        groups=groups,
        counts=_counts(published.rows, total, rows, len(rows) - len(keyed)),
        visual_tokens=float(np.mean([a.visual_tokens for a in answered])) if answered else 0.0,
        seconds=float(np.median([a.seconds for a in answered])) if answered else 0.0,
    )


def estimate(rows: Sequence[Row], over: str) -> Estimate:
    """The mean over rows, or over the groups of the dimension `over`, with its 95 % interval.

    The variance is that of a weighted mean whose deviations are summed within a video before they are
    squared (Miller, arXiv 2411.00640, eq. 4). The interval is Wilson's (1927) for as many independent
    questions as would have that variance, and no more than there are.
    """
    sizes = Counter(row.question.groups[over] if over else "" for row in rows)
    rights = Counter(row.question.groups[over] if over else "" for row in rows if row.right)
    value = sum(rights[group] / size for group, size in sizes.items()) / len(sizes)
    by_video: dict[str, float] = defaultdict(float)
    for row in rows:
        group = row.question.groups[over] if over else ""
        mean = rights[group] / sizes[group]
        by_video[row.question.video] += (row.right - mean) / (sizes[group] * len(sizes))
    variance = sum(deviation**2 for deviation in by_video.values())
    independent: float = len(by_video)  # where all are right, or none
    if 0 < value < 1:
        independent = value * (1 - value) / variance if variance > 0 else math.inf
    low, high = wilson_interval(value, min(independent, len(rows)))
    return Estimate(value, low, high)


def wilson_interval(share: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion of `total` (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # Rounding must not leave the share itself out.
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def _groups(
    benchmark: Benchmark,
    published: Split,
    rows: Sequence[Row],
    dimensions: Sequence[str],
    compression: CompressionConfig | None,
) -> list[GroupResult]:
    results = []
    for dimension in dimensions:
        members: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            members[row.question.groups[dimension]].append(row)
        for group in published.sorted_groups(dimension, members):
            inside = members[group]
            ceiling = None
            if benchmark.ceiling and compression:
                ceiling = benchmark.ceiling(inside[0].question, compression)
            results.append(
                GroupResult(
                    dimension=dimension,
                    group=group,
                    right=sum(row.right for row in inside),
                    total=len(inside),
                    unanswered=sum(bool(row.answer.error) for row in inside),
                    accuracy=estimate(inside, ""),
                    chance=float(np.mean([row.question.chance for row in inside])),
                    ceiling=ceiling,
                )
            )
    return results


def _counts(published: int, total: int, rows: Sequence[Row], without_key: int) -> Counts:
    statuses = Counter(row.status for row in rows)
    return Counts(
        published=published,
        rows=total,
        asked=len(rows),
        parsed=statuses["parsed"],
        unparsed=statuses["unparsed"],
        missing=statuses[MISSING],
        failed=statuses["failed"],
        causes=dict(Counter(row.answer.cause for row in rows if row.status == "failed")),
        without_key=without_key,
        empty_but_right=sum(row.right and not row.answer.reply.strip() for row in rows),
    )
