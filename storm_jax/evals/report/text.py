"""Scores as plain text and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from storm_jax.evals.benchmark import Benchmark
from storm_jax.evals.scoring import Counts, Estimate, GroupResult, Scores


def format_table(benchmark: Benchmark, scores: Scores) -> str:
    """Every group and the headline with 95 % intervals, followed by the counts."""
    lines = []
    if scores.groups or scores.micro:
        width = 2 + max(
            len(name) for name in (*(g.group for g in scores.groups), scores.headline_name)
        )
        has_ceiling = benchmark.ceiling is not None
        head = f"{'':<{width}}{'accuracy':>9}  {'95 % interval':>15}{'chance':>9}"
        lines.append(head + (f"{'ceiling':>9}" if has_ceiling else "") + f"{'n':>7}")
        dimensions = list(dict.fromkeys(group.dimension for group in scores.groups))
        for dimension in dimensions:
            if len(dimensions) > 1:
                lines.append(f"{dimension}: mean of groups {scores.macro[dimension]:.1%}")
            lines += [
                _format_group(group, width, has_ceiling)
                for group in scores.groups
                if group.dimension == dimension
            ]
        lines += _format_overall(benchmark, scores, width)
    return "\n".join([*lines, *format_counts(scores.counts)])


def _format_group(group: GroupResult, width: int, has_ceiling: bool) -> str:
    ceiling = "?" if group.ceiling is None else f"{group.ceiling:.1%}"
    return (
        f"{group.group:<{width}}{_format_estimate(group.accuracy)}{group.chance:>9.1%}"
        f"{ceiling if has_ceiling else '':>{9 * has_ceiling}}{group.total:>7,}"
    )


def _format_overall(benchmark: Benchmark, scores: Scores, width: int) -> list[str]:
    assert scores.headline and scores.micro
    lines = [f"{scores.headline_name:<{width}}{_format_estimate(scores.headline)}"]
    if benchmark.headline_over:
        lines.append(f"{'all':<{width}}{_format_estimate(scores.micro)}")
    return lines


def _format_estimate(found: Estimate) -> str:
    return f"{found.value:>9.1%}  {f'{found.low:.1%} - {found.high:.1%}':>15}"


def format_counts(counts: Counts) -> list[str]:
    """Lines that say how many questions there are, and what became of them."""
    published = f", {counts.published:,} published" if counts.published else ""
    asked = "" if counts.asked == counts.rows else f"; {counts.asked:,} asked"
    lines = [f"{counts.rows:,} questions{published}{asked}"]
    if counts.published and counts.published != counts.rows:
        lines.append(
            "THE FILES DIFFER FROM WHAT WAS PUBLISHED: do not compare this score with others"
        )
    lines.append(
        f"{counts.parsed:,} parsed; counted as wrong: {counts.unparsed:,} unparsed, "
        f"{counts.missing:,} without a video, {counts.failed:,} failed{_format_causes(counts)}"
    )
    if counts.without_key:
        lines.append(f"{counts.without_key:,} not scored: no public answer, or scored by a judge")
    if counts.empty_but_right:
        lines.append(f"{counts.empty_but_right:,} empty replies count as right with this parser")
    return lines


def _format_causes(counts: Counts) -> str:
    listed = ", ".join(f"{cause} {count:,}" for cause, count in counts.causes.items())
    return f" ({listed})" if listed else ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
