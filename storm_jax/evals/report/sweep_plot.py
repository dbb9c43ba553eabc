"""The plot of a sweep: accuracy against visual tokens and against model time."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from storm_jax.config import CompressionConfig
from storm_jax.evals.scoring import Estimate

_NEAR = 0.09  # ticks closer than this part of the axis are merged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a sweep: mean visual tokens and median model seconds per question."""

    compression: CompressionConfig
    accuracy: Estimate
    visual_tokens: float
    seconds: float


def draw_sweep(
    path: pathlib.Path,
    points: Sequence[Point],
    fields: Sequence[str],
    headline: str,
    title: str,
    trained: CompressionConfig,
) -> None:
    """Draws a line per combination of all swept fields but the first, whose values label the points.

    Args:
      fields: those that were swept.
      trained: the compression used in training; its point is marked if it was swept.
    """
    from matplotlib.figure import Figure

    along, *others = fields
    lines: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        label = ", ".join(f"{_name(f)} {getattr(point.compression, f)}" for f in others)
        lines[label].append(point)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    quantities = (
        ("visual_tokens", "visual tokens per question"),
        ("seconds", "model seconds per question"),
    )
    for axis, (quantity, label) in zip(axes, quantities, strict=True):
        for number, (line, members) in enumerate(lines.items()):
            ordered = sorted(members, key=lambda point: getattr(point, quantity))
            _draw_line(axis, quantity, line, ordered, along, above=number % 2 == 0)
        for point in points:
            if point.compression == trained:
                place = getattr(point, quantity), point.accuracy.value * 100
                axis.plot(
                    *place, "o", ms=15, mfc="none", mec="black", mew=1.2, label="as in training"
                )
        axis.set_xlabel(label)
        axis.set_xscale("log", base=2)
        set_ticks(axis, [getattr(point, quantity) for point in points])
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"{headline} in %, 95 % interval")
    handles, labels = axes[0].get_legend_handles_labels()
    if any(labels):
        axes[0].legend(handles, labels, fontsize=9)
    figure.suptitle(f"{title}; labels are {_name(along)}", fontsize=11)
    partial = path.with_suffix(f".{os.getpid()}.png")
    figure.savefig(partial, dpi=130)
    partial.rename(path)


def _draw_line(
    axis: Any, quantity: str, label: str, points: Sequence[Point], along: str, *, above: bool
) -> None:
    """Draws points with intervals; the value of the field `along` is next to each."""
    x = [getattr(point, quantity) for point in points]
    y = [point.accuracy.value * 100 for point in points]
    low = [(p.accuracy.value - p.accuracy.low) * 100 for p in points]
    high = [(p.accuracy.high - p.accuracy.value) * 100 for p in points]
    line = axis.errorbar(
        x, y, (low, high), marker="o", ms=6, capsize=3, lw=1.5, elinewidth=0.8, label=label
    )
    for point, at, value in zip(points, x, y, strict=True):
        axis.annotate(
            str(getattr(point.compression, along)),
            (at, value),
            textcoords="offset points",
            xytext=(-8, 7) if above else (8, -7),
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize=9,
            color=line[0].get_color(),
        )


def set_ticks(axis: Any, values: Sequence[float]) -> None:
    """A tick at every value, except where their labels would overlap."""
    low, high = (math.log2(max(value, 1e-9)) for value in (min(values), max(values)))
    margin = max(0.1 * (high - low), 0.25)
    ticks: list[float] = []
    for value in sorted(set(values)):
        near = _NEAR * (high - low + 2 * margin)
        if not ticks or math.log2(max(value, 1e-9)) - math.log2(max(ticks[-1], 1e-9)) > near:
            ticks.append(value)
    axis.set_xticks(ticks, [f"{tick:,.0f}" if tick >= 100 else f"{tick:.2g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(2 ** (low - margin), 2 ** (high + margin))


def _name(field: str) -> str:
    return field.replace("_", " ")
