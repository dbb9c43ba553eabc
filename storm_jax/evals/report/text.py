"""Scores as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from storm_jax.evals.benchmark import Benchmark
from storm_jax.evals.scoring import Counts, Estimate, GroupResult, Scores


def table(benchmark: Benchmark, scores: Scores) -> str:
    """Every group with its 95 % interval, the headline, and what could not be scored."""
    lines = []
    if scores.groups or scores.micro:
        width = 2 + max(
            len(name) for name in (*(g.group for g in scores.groups), scores.headline_name)
        )
        with_ceiling = benchmark.ceiling is not None
        head = f"{'':<{width}}{'accuracy':>9}  {'95 % interval':>15}{'chance':>9}"
        lines.append(head + (f"{'ceiling':>9}" if with_ceiling else "") + f"{'n':>7}")
        dimensions = list(dict.fromkeys(group.dimension for group in scores.groups))
        for dimension in dimensions:
            if len(dimensions) > 1:
                lines.append(f"{dimension}: mean of groups {scores.macro[dimension]:.1%}")
            lines += [
                _group(group, width, with_ceiling)
                for group in scores.groups
                if group.dimension == dimension
            ]
        lines += _overall(benchmark, scores, width)
    return "\n".join([*lines, *told(scores.counts)])


def _group(group: GroupResult, width: int, with_ceiling: bool) -> str:
    ceiling = "?" if group.ceiling is None else f"{group.ceiling:.1%}"
    return (
        f"{group.group:<{width}}{_estimate(group.accuracy)}{group.chance:>9.1%}"
        f"{ceiling if with_ceiling else '':>{9 * with_ceiling}}{group.total:>7,}"
    )


def _overall(benchmark: Benchmark, scores: Scores, width: int) -> list[str]:
    assert scores.headline and scores.micro
    lines = [f"{scores.headline_name:<{width}}{_estimate(scores.headline)}"]
    if benchmark.headline_over:
        lines.append(f"{'all':<{width}}{_estimate(scores.micro)}")
    return lines


def _estimate(found: Estimate) -> str:
    return f"{found.value:>9.1%}  {f'{found.low:.1%} - {found.high:.1%}':>15}"


def told(counts: Counts) -> list[str]:
    """How many questions there are, and what became of them."""
    published = f", {counts.published:,} published" if counts.published else ""
    asked = "" if counts.asked == counts.rows else f"; {counts.asked:,} asked"
    lines = [f"{counts.rows:,} questions{published}{asked}"]
    if counts.published and counts.published != counts.rows:
        lines.append(
            "THE FILES DO NOT HOLD WHAT WAS PUBLISHED: this is no figure to compare with others'"
        )
    lines.append(
        f"{counts.parsed:,} parsed; counted as wrong: {counts.unparsed:,} unparsed, "
        f"{counts.missing:,} without a video, {counts.failed:,} failed{_causes(counts)}"
    )
    if counts.without_key:
        lines.append(f"{counts.without_key:,} have no public answer, or a judge scores them")
    if counts.empty_but_right:
        lines.append(
            f"{counts.empty_but_right:,} empty replies count as right: so this parser has it"
        )
    return lines


def _causes(counts: Counts) -> str:
    listed = ", ".join(f"{cause} {count:,}" for cause, count in counts.causes.items())
    return f" ({listed})" if listed else ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
