"""Scores. The denominator is all questions: missing videos, failures and unparseable replies count as
wrong, and each count is reported."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import MISSING, Benchmark, ScoredReply, Split

_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A proportion and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Accuracy of a group of questions; `unanswered` of `total` have a missing or unreadable video."""

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
    """Numbers of questions.

    Attributes:
      published: in the published benchmark; 0 if that varies.
      rows: in the files.
      asked: of `rows`, those that were asked; split into the next four.
      parsed, unparsed: whose reply could be parsed, or not.
      missing, failed: whose video does not exist, and whose video or subtitles could not be used.
      causes: `failed` by cause.
      without_key: without a public answer; these are not scored.
      empty_but_right: whose reply is empty but counts as right with this parser.
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
    """Scores of one evaluation.

    Attributes:
      headline: the authors' main metric; None if no answer is public.
      micro: mean over questions.
      macro: mean over the groups of each dimension.
      visual_tokens, seconds: mean number per answered question, and median model time.
    """

    headline_name: str
    headline: Estimate | None
    micro: Estimate | None
    macro: Mapping[str, float]
    groups: Sequence[GroupResult]
    counts: Counts
    visual_tokens: float
    seconds: float

    def problem(self, required: Sequence[str] = (), *, allow_missing: bool = False) -> str:
        """The reason not to trust these scores, "" if there is none: videos are missing, nothing was
        answered, or a required group's 95 % lower bound is not 10 points above chance."""
        counts = self.counts
        if counts.missing and not allow_missing:
            return f"{counts.missing:,} questions have no video; use --allow_missing to accept that"
        if not counts.parsed + counts.unparsed:
            return "no question could be answered"
        groups = {group.group: group for group in self.groups}
        if unknown := [name for name in required if name not in groups]:
            return f"--require={unknown[0]}: the groups are {', '.join(groups)}"
        low = [
            name
            for name in dict.fromkeys(required)
            if groups[name].accuracy.low < groups[name].chance + _MARGIN
        ]
        return f"not {_MARGIN:.0%} above chance: {', '.join(low)}" if low else ""


def score(
    benchmark: Benchmark,
    split: str,
    replies: Sequence[ScoredReply],
    total: int,
    compression: CompressionConfig | None = None,
) -> Scores:
    """Scores the replies of a split whose files have `total` questions. Questions that a judge scores
    count as without a public answer."""
    published = benchmark.splits[split]
    keyed = [reply for reply in replies if reply.question.answer is not None]
    keyed = [] if published.judged else keyed
    dimensions = list(dict.fromkeys(name for reply in replies for name in reply.question.groups))
    answered = [reply.prediction for reply in replies if not reply.prediction.error]
    groups = _groups(benchmark, published, keyed, dimensions, compression)
    return Scores(
        headline_name=benchmark.headline,
        headline=estimate(keyed, benchmark.headline_over) if keyed else None,
        micro=estimate(keyed) if keyed else None,
        macro={
            dimension: float(
                np.mean([g.accuracy.value for g in groups if g.dimension == dimension])
            )
            for dimension in dimensions
            if keyed
        },
        groups=groups,
        counts=_counts(published.rows, total, replies, len(replies) - len(keyed)),
        visual_tokens=float(np.mean([p.visual_tokens for p in answered])) if answered else 0.0,
        seconds=float(np.median([p.seconds for p in answered])) if answered else 0.0,
    )


def estimate(replies: Sequence[ScoredReply], over: Sequence[str] = ()) -> Estimate:
    """The mean over replies with its 95 % interval.

    Args:
      over: dimensions, outermost first: the mean over the groups of the first one, of the means over the
        groups of the second one in each, and so on.

    The variance is that of a weighted mean with questions clustered by video (Miller, arXiv 2411.00640,
    eq. 4). The interval is Wilson's (1927) for the number of independent questions with that variance,
    which is at most the number of replies.
    """
    cells = [tuple(reply.question.groups[dimension] for dimension in over) for reply in replies]
    sizes = Counter(cells)
    right = Counter(cell for cell, reply in zip(cells, replies, strict=True) if reply.right)
    shares = {  # of each cell in the mean
        cell: 1 / math.prod(_children(cell[:depth], sizes) for depth in range(len(over)))
        for cell in sizes
    }
    value = sum(shares[cell] * right[cell] / size for cell, size in sizes.items())
    by_video: dict[str, float] = defaultdict(float)
    for cell, reply in zip(cells, replies, strict=True):
        deviation = reply.right - right[cell] / sizes[cell]
        by_video[reply.question.video] += deviation * shares[cell] / sizes[cell]
    variance = sum(deviation**2 for deviation in by_video.values())
    independent: float = len(by_video)  # if all or none are right
    if 0 < value < 1:
        independent = value * (1 - value) / variance if variance > 0 else math.inf
    low, high = wilson_interval(value, min(independent, len(replies)))
    return Estimate(value, low, high)


def _children(parent: tuple[str, ...], cells: Iterable[tuple[str, ...]]) -> int:
    """How many groups of the next dimension there are in a group."""
    depth = len(parent)
    return len({cell[depth] for cell in cells if cell[:depth] == parent})


def wilson_interval(proportion: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion of `total` (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    centre = proportion + z**2 / (2 * total)
    spread = z * math.sqrt(proportion * (1 - proportion) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # Rounding must not exclude the proportion itself.
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(proportion, low)), min(1.0, max(proportion, high))


def _groups(
    benchmark: Benchmark,
    published: Split,
    replies: Sequence[ScoredReply],
    dimensions: Sequence[str],
    compression: CompressionConfig | None,
) -> list[GroupResult]:
    results = []
    for dimension in dimensions:
        inner = _inner(benchmark.headline_over, dimension)
        by_group: dict[str, list[ScoredReply]] = defaultdict(list)
        for reply in replies:
            by_group[reply.question.groups[dimension]].append(reply)
        for group in published.sorted_groups(dimension, by_group):
            members = by_group[group]
            ceiling = None
            if benchmark.ceiling and compression:
                ceiling = benchmark.ceiling(members[0].question, compression)
            results.append(
                GroupResult(
                    dimension=dimension,
                    group=group,
                    right=sum(reply.right for reply in members),
                    total=len(members),
                    unanswered=sum(bool(reply.prediction.error) for reply in members),
                    accuracy=estimate(members, inner),
                    chance=float(np.mean([reply.question.chance for reply in members])),
                    ceiling=ceiling,
                )
            )
    return results


def _inner(over: Sequence[str], dimension: str) -> Sequence[str]:
    """The dimensions that the main metric averages within the groups of `dimension`."""
    return over[over.index(dimension) + 1 :] if dimension in over else ()


def _counts(published: int, total: int, replies: Sequence[ScoredReply], without_key: int) -> Counts:
    statuses = Counter(reply.status for reply in replies)
    failed = [reply.prediction.cause for reply in replies if reply.status == "failed"]
    return Counts(
        published=published,
        rows=total,
        asked=len(replies),
        parsed=statuses["parsed"],
        unparsed=statuses["unparsed"],
        missing=statuses[MISSING],
        failed=statuses["failed"],
        causes=dict(Counter(failed)),
        without_key=without_key,
        empty_but_right=sum(r.right and not r.prediction.text.strip() for r in replies),
    )
