"""Checks the files of a benchmark without loading a model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from storm_jax.evals.benchmark import Benchmark, Question
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.files import archives, is_there

_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Checked:
    """The lines of a check, and whether everything that was published is present."""

    lines: Sequence[str]
    complete: bool

    def __str__(self) -> str:
        return "\n".join(self.lines)


def check(benchmark: str, data_root: str | pathlib.Path, *, split: str = "") -> Checked:
    """Compares the files of a benchmark with the published counts, and lists missing videos.

        print(storm_jax.evals.check("videomme", "data/videomme"))

    Args:
      benchmark: its name.
      data_root: folder of its files.
      split: defaults to the benchmark's first.

    Raises:
      BenchmarkError: if there are no questions, or they are malformed.
    """
    found = BENCHMARKS[benchmark]
    split = found.pick_split(split)
    root = pathlib.Path(data_root)
    return check_questions(found, split, found.questions(root, split), root)


def check_questions(
    benchmark: Benchmark, split: str, questions: Sequence[Question], root: pathlib.Path
) -> Checked:
    """Compares the number of questions with the published one, per group, and counts missing videos."""
    published = benchmark.splits[split]
    missing = [q for q in questions if q.media.path is not None and not is_there(q.media.path)]
    lines = [
        f"{benchmark.title} {split}: {_compare(len(questions), published.rows)} questions about "
        f"{len({q.video for q in questions}):,} videos"
    ]
    complete = not missing and len(questions) == (published.rows or len(questions))
    for dimension in dict.fromkeys(name for q in questions for name in q.groups):
        expected = dict(published.groups.get(dimension, {}))
        counts = Counter(q.groups[dimension] for q in questions)
        missing_counts = Counter(q.groups[dimension] for q in missing)
        lines.append(f"  {dimension}")
        for name in published.sorted_groups(dimension, {*counts, *expected}):
            count = _compare(counts[name], expected.get(name, 0))
            without = f", {missing_counts[name]:,} without a video" if missing_counts[name] else ""
            lines.append(f"    {name}: {count}{without}")
            complete &= counts[name] == (expected.get(name) or counts[name])
    lines += _describe_answers(questions, published.judged)
    if benchmark.captions:
        subtitled = {q.video: q for q in questions if q.subtitles}
        lines.append(f"  videos with subtitles: {len(subtitled):,}")
        lines += _describe_unreadable(benchmark.captions, subtitled.values())
    lines += _describe_missing(missing, root)
    if not complete:
        lines.append("the files differ from what was published")
    return Checked(lines, complete)


def _compare(count: int, published: int) -> str:
    if not published or count == published:
        return f"{count:,}"
    return f"{count:,} (PUBLISHED: {published:,})"


def _describe_answers(questions: Sequence[Question], judged: bool) -> list[str]:
    if judged:
        return ["  replies are scored by a judge"]
    private = sum(q.answer is None for q in questions)
    impossible = [q.id for q in questions if q.options and q.answer == ""]
    lines = [f"  without a public answer: {private:,}"] if private else []
    if impossible:
        lines.append(f"  with an answer that is not among the options: {', '.join(impossible)}")
    return lines


def _describe_unreadable(
    captions: Callable[[Question, np.ndarray], object], questions: Iterable[Question]
) -> list[str]:
    """Subtitle files that cannot be read."""
    problems = []
    for question in questions:
        try:
            captions(question, np.zeros(0))
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"    {question.subtitles}: {error}")
    return [f"  unreadable subtitles: {len(problems):,}", *problems[:_EXAMPLES]] if problems else []


def _describe_missing(missing: Sequence[Question], root: pathlib.Path) -> list[str]:
    if not missing:
        return ["  no video is missing"]
    files = list(dict.fromkeys(str(q.media.path) for q in missing))
    lines = [f"  missing videos: {len(files):,} (of {len(missing):,} questions)"]
    lines += [f"    {file}" for file in files[:_EXAMPLES]]
    if len(files) > _EXAMPLES:
        lines.append("    ...")
    if packed := archives(root):
        lines.append(f"  not unpacked? {', '.join(packed[:_EXAMPLES])}")
    return lines
