"""Looks at the files of a benchmark before any model is loaded."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence

from storm_jax.evals.benchmark import Benchmark
from storm_jax.evals.files import archives, is_there
from storm_jax.evals.questions import Question

EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found: the lines to print, and whether all that was published is here."""

    lines: Sequence[str]
    complete: bool


def check(
    benchmark: Benchmark, split: str, questions: Sequence[Question], root: pathlib.Path
) -> Checked:
    """Counts questions against what was published, group by group, and what they lack."""
    published = benchmark.splits[split]
    absent = [q for q in questions if q.media.path is not None and not is_there(q.media.path)]
    lines = [
        f"{benchmark.title} {split}: {_compared(len(questions), published.rows)} questions about "
        f"{len({q.video for q in questions}):,} videos"
    ]
    complete = not absent and len(questions) == (published.rows or len(questions))
    for dimension in dict.fromkeys(name for q in questions for name in q.groups):
        expected = dict(published.groups.get(dimension, {}))
        here = Counter(q.groups[dimension] for q in questions)
        lacking = Counter(q.groups[dimension] for q in absent)
        lines.append(f"  {dimension}")
        for name in published.sorted_groups(dimension, {*here, *expected}):
            count = _compared(here[name], expected.get(name, 0))
            without = f", {lacking[name]:,} without a video" if lacking[name] else ""
            lines.append(f"    {name}: {count}{without}")
            complete &= here[name] == (expected.get(name) or here[name])
    lines += _keys(questions, published.judged)
    if benchmark.captions:
        with_some = len({q.video for q in questions if q.subtitles})
        lines.append(f"  videos with subtitles: {with_some:,}")
    lines += _absent(absent, root)
    if not complete:
        lines.append("the files are not what was published")
    return Checked(lines, complete)


def _compared(count: int, published: int) -> str:
    if not published or count == published:
        return f"{count:,}"
    return f"{count:,} (PUBLISHED: {published:,})"


def _keys(questions: Sequence[Question], judged: bool) -> list[str]:
    if judged:
        return ["  a judge scores the replies"]
    without = sum(q.answer is None for q in questions)
    impossible = [q.id for q in questions if q.options and q.answer == ""]
    lines = [f"  without a public answer: {without:,}"] if without else []
    if impossible:
        lines.append(f"  with an answer that is none of the options: {', '.join(impossible)}")
    return lines


def _absent(absent: Sequence[Question], root: pathlib.Path) -> list[str]:
    if not absent:
        return ["  every video is here"]
    files = list(dict.fromkeys(str(q.media.path) for q in absent))
    lines = [f"  missing videos: {len(files):,}, of {len(absent):,} questions"]
    lines += [f"    {file}" for file in files[:EXAMPLES]]
    if len(files) > EXAMPLES:
        lines.append("    ...")
    if packed := archives(root):
        lines.append(f"  not unpacked? {', '.join(packed[:EXAMPLES])}")
    return lines
