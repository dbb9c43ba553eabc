"""Runs a benchmark on a predictor and writes the report.

    RUN/evals/BENCHMARK/SETTINGS/predictions.jsonl    one line per question, failures with cause
    RUN/evals/BENCHMARK/SETTINGS/results.json         accuracy and 95 % interval per group
    RUN/evals/BENCHMARK/SETTINGS/contact_sheet.png    frames, question and answer of some questions

A question whose media cannot be read counts as wrong.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from storm_jax.config import CompressionConfig
from storm_jax.data.progress import with_progress
from storm_jax.evals.benchmark import Benchmark, Question, wilson_interval
from storm_jax.evals.contact_sheet import Panel, draw_contact_sheet
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Prediction, Predictor
from storm_jax.run import write_atomically, write_lines

PANELS_PER_GROUP = 2


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """Accuracy of one group of questions; `low` and `high` bound its 95 % interval."""

    group: str
    right: int
    total: int
    failed: int
    accuracy: float
    low: float
    high: float
    chance: float
    ceiling: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What one evaluation found and where it was written."""

    benchmark: str
    step: int
    compression: CompressionConfig
    groups: Sequence[GroupResult]
    folder: pathlib.Path

    def table(self) -> str:
        """Accuracy per group, beside chance and ceiling, as text."""
        lines = [
            f"{'':<12}{'accuracy':>9}  {'95 % interval':>15}{'chance':>9}{'ceiling':>9}{'n':>7}"
        ]
        for result in self.groups:
            ceiling = "?" if result.ceiling is None else f"{result.ceiling:.1%}"
            lines.append(
                f"{result.group:<12}{result.accuracy:>9.1%}  "
                f"{f'{result.low:.1%} - {result.high:.1%}':>15}"
                f"{result.chance:>9.1%}{ceiling:>9}{result.total:>7}"
            )
        return "\n".join(lines)


def evaluate(
    predictor: Predictor,
    benchmark: Benchmark,
    compression: CompressionConfig,
    folder: pathlib.Path,
    *,
    limit: int | None = None,
    batch_size: int = 32,
) -> Report:
    """Answers the first `limit` questions (all by default) greedily and writes the report."""
    questions = list(benchmark.questions)[:limit]
    predictions: dict[int, Prediction] = {}
    panels = _PanelPicker()
    samples = [question.sample for question in questions]
    answered = predictor.predict(
        samples, compression=compression, sampling=Sampling(), batch_size=batch_size
    )
    line = "{done:,} of {total:,} questions, {left:.0f} s left"
    for index, prediction in with_progress(answered, len(questions), line, tells_end=True):
        right = benchmark.is_right(questions[index], prediction.text)
        panels.add(questions[index], prediction, right)
        predictions[index] = dataclasses.replace(prediction, clips=(), times=())
    groups = _score(benchmark, questions, predictions, compression)
    report = Report(benchmark.name, predictor.step, compression, groups, folder)
    _write(report, benchmark, questions, predictions)
    if panels.panels:
        draw_contact_sheet(folder / "contact_sheet.png", panels.panels)
    return report


def settings_name(compression: CompressionConfig, step: int, limit: int | None) -> str:
    """The folder of an evaluation, such as "step600_frames16_k4_p1_s1"."""
    name = (
        f"step{step}_frames{compression.num_frames}_k{compression.temporal_pool}"
        f"_p{compression.spatial_pool}_s{compression.temporal_sample}"
    )
    return name if limit is None else f"{name}_limit{limit}"


def _score(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: dict[int, Prediction],
    compression: CompressionConfig,
) -> list[GroupResult]:
    results = []
    for group, chance in benchmark.chance.items():
        members = [i for i, question in enumerate(questions) if question.group == group]
        if not members:
            continue
        right = sum(benchmark.is_right(questions[i], predictions[i].text) for i in members)
        failed = sum(bool(predictions[i].error) for i in members)
        low, high = wilson_interval(right, len(members))
        ceiling = benchmark.ceiling(group, compression)
        results.append(
            GroupResult(
                group, right, len(members), failed, right / len(members), low, high, chance, ceiling
            )
        )
    return results


def _write(
    report: Report,
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: dict[int, Prediction],
) -> None:
    report.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "id": question.sample.id,
            "group": question.group,
            "question": question.sample.turns[-1].text,
            "answer": question.answer,
            "prediction": predictions[i].text,
            "right": benchmark.is_right(question, predictions[i].text),
            "error": predictions[i].error,
        }
        for i, question in enumerate(questions)
    ]
    write_lines(report.folder / "predictions.jsonl", lines)
    results = {
        "benchmark": report.benchmark,
        "step": report.step,
        "compression": dataclasses.asdict(report.compression),
        "groups": [dataclasses.asdict(group) for group in report.groups],
    }
    write_atomically(report.folder / "results.json", json.dumps(results, indent=2) + "\n")


class _PanelPicker:
    """The first questions of each group that could be answered."""

    def __init__(self) -> None:
        self.panels: list[Panel] = []

    def add(self, question: Question, prediction: Prediction, right: bool) -> None:
        taken = sum(panel.title == question.group for panel in self.panels)
        if prediction.clips and taken < PANELS_PER_GROUP:
            self.panels.append(
                Panel(
                    question.group,
                    prediction.clips[0],
                    prediction.times[0],
                    question.sample.turns[-1].text,
                    question.answer,
                    prediction.text,
                    right,
                )
            )
