"""What records say about rows, and what models without mixing could reach."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.rows import (
    COMPRESSIONS,
    EVAL_CLIPS,
    MIXER_TESTS,
    MIXERS,
    RATES,
    STORM,
    TASKS,
    Row,
    mixer_row,
)
from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.tasks import shapes

Records = Sequence[Mapping[str, Any]]


def any_of(records: Records, rows: Iterable[Row]) -> bool:
    """Whether any of some rows has been tested."""
    names = {row.name for row in rows}
    return any(record["row"] in names for record in records)


def accuracies(records: Records, row: Row, test: str, family: str) -> list[float]:
    """The accuracy of each seed."""
    return list(accuracies_by_seed(records, row, test, family).values())


def accuracies_by_seed(records: Records, row: Row, test: str, family: str) -> dict[int, float]:
    """The accuracy of each seed, by seed."""
    counts = {
        record["seed"]: record["right"][family]
        for record in records
        if (record["row"], record["test"]) == (row.name, test)
    }
    return {seed: right / total for seed, (right, total) in counts.items()}


def best_rate(records: Records, mixer: str) -> float | None:
    """The learning rate with the highest of `rate_means`, in a tie the first of RATES; None without any."""
    means = rate_means(records, mixer)
    return max(means, key=lambda rate: means[rate]) if means else None


def losing_rows(records: Records) -> set[str]:
    """Names of the rows of mixers whose learning rate is not the best of those tested."""
    losing = set()
    for mixer in MIXERS:
        best = best_rate(records, mixer)
        if best is not None:
            losing |= {mixer_row(mixer, rate).name for rate in RATES if rate != best}
    return losing - {STORM.name}  # it is not only a mixer's row


def rate_means(records: Records, mixer: str) -> dict[float, float]:
    """By learning rate of a mixer that has been tested with the first seed: its mean accuracy over families and budgets."""
    means = {rate: _mean(records, mixer_row(mixer, rate)) for rate in RATES}
    return {rate: mean for rate, mean in means.items() if mean is not None}


def _mean(records: Records, row: Row) -> float | None:
    """The mean accuracy of a row with the first seed; None if it has not been tested."""
    first = min(record["seed"] for record in records)
    families = TASKS[row.task].videos
    found = [
        accuracies_by_seed(records, row, b, f).get(first) for b in MIXER_TESTS for f in families
    ]
    tested = [accuracy for accuracy in found if accuracy is not None]
    return statistics.fmean(tested) if tested else None


def ceiling(family: str, task: str, compression: CompressionConfig) -> float:
    """The best expected accuracy of a model that does not mix frames, on the test clips."""
    return shapes.ceiling(family, _settings(task), compression, "test")


def frames_ceiling(family: str, test: str) -> float:
    """The best expected accuracy on long clips of any model that sees the frames that a test reads."""
    uncompressed = CompressionConfig(num_frames=COMPRESSIONS[test].num_frames)
    return ceiling(family, "long", uncompressed)


def forward_limit(family: str, compression: CompressionConfig) -> float:
    """The best expected accuracy of a model that scans clips of 16 frames forwards only, on the test clips: events that
    begin after the last group that is kept are guessed."""
    settings = _settings("short")
    kept = plan_clip(settings.frames, Grid.square(1), compression).frame_group >= 0
    last = int(np.flatnonzero(kept)[-1])
    events = shapes.events_of(settings, "test", family)
    is_seen = [any(label is not None for label in event.labels[: last + 1]) for event in events]
    return float(np.where(is_seen, 1, shapes.FAMILIES[family].chance).mean())


def _settings(task: str) -> shapes.Settings:
    about = TASKS[task]
    return shapes.Settings(
        clips=about.clips,
        seed=0,
        families=about.families,
        frames=about.frames,
        eval_clips=EVAL_CLIPS,
    )


def visual_tokens(test: str) -> int:
    """Visual tokens of a clip."""
    compression = COMPRESSIONS[test]
    grid = Grid.of(STORM.config(pathlib.Path(), seed=0).model)
    return plan_clip(compression.num_frames, grid, compression).num_tokens
