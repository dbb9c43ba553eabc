"""Accuracy against visual tokens and latency, over several compressions (in the manner of the paper's
Figure 4)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.report import markdown
from storm_jax.evals.scoring import Estimate, Scores
from storm_jax.files import write_atomically

FIELDS = tuple(field.name for field in dataclasses.fields(CompressionConfig))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a sweep: mean visual tokens and median seconds of a question."""

    compression: CompressionConfig
    accuracy: Estimate
    visual_tokens: float
    seconds: float


def point(compression: CompressionConfig, scores: Scores) -> Point | None:
    """What a sweep keeps of an evaluation, None where no answer is public."""
    if scores.headline is None:
        return None
    return Point(
        compression=compression,
        accuracy=scores.headline,
        visual_tokens=scores.visual_tokens,
        seconds=scores.seconds,
    )


def parse(texts: Sequence[str]) -> dict[str, list[int]]:
    """`num_frames=8,16` to values by field.

    Raises:
      BenchmarkError: for anything else.
    """
    swept: dict[str, list[int]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in FIELDS or name in swept:
            raise BenchmarkError(
                f"--sweep={text}: it must be FIELD=VALUE,VALUE with each FIELD of {', '.join(FIELDS)} once"
            )
        try:
            swept[name] = [int(value) for value in values.split(",")]
        except ValueError:
            swept[name] = []
        if not swept[name] or min(swept[name]) < 1:
            raise BenchmarkError(f"--sweep={text}: the values must be whole numbers from 1")
    return swept


def compressions(
    swept: dict[str, list[int]], base: CompressionConfig
) -> Iterator[CompressionConfig]:
    """`base` with every combination of the values, the first field changing fastest."""
    names = list(swept)[::-1]
    for values in itertools.product(*(swept[name] for name in names)):
        yield dataclasses.replace(base, **dict(zip(names, values, strict=True)))


def write(
    points: Sequence[Point], swept: Sequence[str], headline: str, title: str, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Writes sweep.json, sweep.md and sweep.png; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sweep.{ending}" for ending in ("json", "md", "png")]
    records = [dataclasses.asdict(point) for point in points]
    write_atomically(paths[0], json.dumps(records, indent=2) + "\n")
    head = (*swept, headline, "95 % interval", "visual tokens", "seconds a question")
    rows = [
        (
            *(str(getattr(point.compression, name)) for name in swept),
            f"{point.accuracy.value:.1%}",
            f"{point.accuracy.low:.1%} - {point.accuracy.high:.1%}",
            f"{point.visual_tokens:,.0f}",
            f"{point.seconds:.3g}",
        )
        for point in points
    ]
    write_atomically(paths[1], f"{title}\n\n{markdown([head, *rows])}\n")
    _draw(points, swept, headline, title, paths[2])
    return paths


def _draw(
    points: Sequence[Point], swept: Sequence[str], headline: str, title: str, path: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    along, *others = swept
    lines: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        label = ", ".join(f"{name}={getattr(point.compression, name)}" for name in others)
        lines[label].append(point)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, unit in zip(
        axes, ("visual_tokens", "seconds"), ("visual tokens", "seconds a question"), strict=True
    ):
        for label, members in lines.items():
            x = [getattr(point, name) for point in members]
            y = [point.accuracy.value * 100 for point in members]
            low = [value - p.accuracy.low * 100 for value, p in zip(y, members, strict=True)]
            high = [p.accuracy.high * 100 - value for value, p in zip(y, members, strict=True)]
            axis.errorbar(x, y, (low, high), marker="o", capsize=2, label=label)
            for point, at, value in zip(members, x, y, strict=True):
                axis.annotate(
                    str(getattr(point.compression, along)),
                    (at, value),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=8,
                )
        axis.set_xlabel(unit)
        if name == "visual_tokens":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_ylabel(f"{headline} in %, with its 95 % interval")
    if others:
        axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}; the numbers are {along}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
