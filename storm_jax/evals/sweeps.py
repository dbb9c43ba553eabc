"""Accuracy against visual tokens and time for several compressions, like the paper's Figure 4."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.evaluation import (
    COMPRESSION_FIELDS,
    LazyPredictor,
    evaluate,
    report_folder,
    resolve_compression,
)
from storm_jax.evals.report.files import Report
from storm_jax.evals.report.sweep_plot import Point, draw_sweep
from storm_jax.evals.report.text import markdown
from storm_jax.files import write_atomically
from storm_jax.inference.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The reports of a sweep, None where other shards still have questions to ask; and the files written,
    none if a report or its score is missing."""

    reports: Sequence[Report | None]
    files: Sequence[pathlib.Path]


def sweep(
    run: str | pathlib.Path | Predictor,
    benchmark: str,
    values: Mapping[str, Sequence[int]],
    *,
    step: int | None = None,
    weights: str = "",
    **options: Any,
) -> Sweep:
    """Evaluates with every combination of `values`, the first field changing fastest.

        storm_jax.evals.sweep("runs/sft", "mlvu", {"num_frames": [8, 16, 32]}, data_root="data/mlvu")

    Writes sweep.json, a table and a plot next to the reports.

    Args:
      values: by field of the compression.
      step, weights, options: as in `evaluate`.
    """
    model = LazyPredictor(run, step, weights)
    overrides = {name: options.pop(name, None) for name in COMPRESSION_FIELDS}
    reports: list[Report | None] = []
    for combination in _combinations(values):
        print(", ".join(f"{name}={combination[name]}" for name in values), flush=True)
        report = evaluate(model, benchmark, **options, **overrides | combination)
        if report:
            print(report, *report.files, sep="\n", flush=True)
        reports.append(report)
    points = [
        Point(
            compression=report.settings.compression,
            accuracy=report.scores.headline,
            visual_tokens=report.scores.visual_tokens,
            seconds=report.scores.seconds,
        )
        for report in reports
        if report and report.settings and report.scores.headline
    ]
    last = reports[-1]
    if len(points) < len(reports) or last is None or last.settings is None:
        return Sweep(reports, ())
    trained = model.run.config.compression
    base = resolve_compression(trained, benchmark, options.get("settings", ""), overrides)
    unswept = dataclasses.replace(last.settings, compression=base)
    sibling = report_folder(model, last.benchmark, unswept)
    folder = sibling.with_name(f"sweep_{'_'.join(values)}_{sibling.name}")
    title = f"{last.benchmark.title} {last.split}, step {model.step}"
    files = _write(points, list(values), last.scores.headline_name, title, trained, folder)
    return Sweep(reports, files)


def parse_sweep(texts: Sequence[str]) -> dict[str, list[int]]:
    """Reads values like `num_frames=8,16`, by field.

    Raises:
      BenchmarkError: for anything else, and if a field is repeated.
    """
    values: dict[str, list[int]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        if name not in COMPRESSION_FIELDS or name in values:
            raise BenchmarkError(
                f"--sweep={text}: must be FIELD=VALUE,VALUE; the fields are "
                f"{', '.join(COMPRESSION_FIELDS)}, each at most once"
            )
        try:
            values[name] = [int(value) for value in listed.split(",")]
        except ValueError:
            values[name] = []
        if not values[name] or min(values[name]) < 1:
            raise BenchmarkError(f"--sweep={text}: values must be positive integers")
    return values


def _combinations(values: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    names = list(values)[::-1]
    for combination in itertools.product(*(values[name] for name in names)):
        yield dict(zip(names, combination, strict=True))


def _write(
    points: Sequence[Point],
    fields: Sequence[str],
    headline: str,
    title: str,
    trained: CompressionConfig,
    folder: pathlib.Path,
) -> list[pathlib.Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sweep.{ending}" for ending in ("json", "md", "png")]
    records = [dataclasses.asdict(point) for point in points]
    write_atomically(paths[0], json.dumps(records, indent=2) + "\n")
    head = (*fields, headline, "95 % interval", "visual tokens", "seconds per question")
    rows = [
        (
            *(str(getattr(point.compression, name)) for name in fields),
            f"{point.accuracy.value:.1%}",
            f"{point.accuracy.low:.1%} - {point.accuracy.high:.1%}",
            f"{point.visual_tokens:,.0f}",
            f"{point.seconds:.3g}",
        )
        for point in points
    ]
    write_atomically(paths[1], f"{title}\n\n{markdown([head, *rows])}\n")
    draw_sweep(paths[2], points, fields, headline, title, trained)
    return paths
