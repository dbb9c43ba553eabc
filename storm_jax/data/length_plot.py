"""Draws histograms of the token and frame counts of a mixture's samples."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from storm_jax.data.mixture import Mixture

_BINS = 40
_MAX_BARS = 12  # up to this many different frame counts get one labelled bar each
_LOG_RATIO = 50  # counts that span a larger ratio get a log axis


def draw_lengths(mixture: Mixture, path: pathlib.Path) -> None:
    """Writes a picture with the tokens and frames per sample, stacked by source."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    parts, shapes = mixture.parts, mixture.shapes
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    tokens = [part.lengths.tokens[part.usable].ravel() for part in parts]
    each = ", in each compression" if len(mixture.compressions) > 1 else ""
    frames = [part.lengths.frames[part.usable] for part in parts]
    colours = colormaps["tab20"](np.arange(len(parts)) % 20)
    bars = draw_counts(axes[0], tokens, [shape.tokens for shape in shapes], colours)
    limits = [shape.frames for shape in shapes]
    draw_counts(axes[1], frames, limits, colours, max_bars=_MAX_BARS)
    axes[0].set(
        title=f"Tokens per sample (text and visual){each}", xlabel="tokens", ylabel="samples"
    )
    axes[1].set(title="Frames per sample (all media)", xlabel="frames", ylabel="samples")
    names = [f"{part.config.name}: {len(part.usable):,}" for part in parts]
    columns = -(-len(names) // 24)
    figure.legend(
        bars,
        names,
        loc="outside right upper",
        title="samples per source",
        fontsize=8,
        title_fontsize=9,
        ncols=columns,
    )
    figure.savefig(path, dpi=110)


def draw_counts(
    axis: Any,
    counts: Sequence[np.ndarray],
    limits: Sequence[int],
    colours: np.ndarray,
    max_bars: int = 1,
) -> list[Any]:
    """Draws stacked histograms of the counts int [M] of several sources on a matplotlib axis.

    The axis covers the data. Row limits on that scale are dotted lines; others are only noted.

    Args:
      max_bars: up to this many different counts get one labelled bar each instead of bins.

    Returns:
      One legend handle per source.
    """
    values = np.unique(np.concatenate(counts))
    low, high = int(values[0]), int(values[-1])
    if len(values) <= max_bars:
        positions = [np.searchsorted(values, each) for each in counts]
        edges = np.arange(len(values) + 1) - 0.5
        axis.set_xticks(range(len(values)), [f"{value:,}" for value in values])
        on_scale = [limit for limit in limits if limit in values]
        places = [int(np.searchsorted(values, limit)) for limit in on_scale]
    else:
        positions, edges = list(counts), choose_edges(values, _BINS)
        on_scale = places = [limit for limit in limits if limit <= high + (high - low) / 5]
        if high > _LOG_RATIO * max(1, low):
            axis.set_xscale("symlog", linthresh=1)  # shows zero, too
            ticks = [n * 10**e for e in range(10) for n in (1, 2, 5) if low <= n * 10**e <= high]
            axis.set_xticks([0, *ticks] if low == 0 else ticks)
            axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(axis="x", labelrotation=30)
    *_, drawn = axis.hist(positions, bins=edges, stacked=True, color=list(colours), rwidth=0.85)
    axis.margins(x=0.05 if len(values) > 3 else 0.5, y=0.2)  # the note is above the bars
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    for place in places:
        axis.axvline(place, color="black", linestyle=":", linewidth=1)
    _note_limits(axis, limits, on_scale)
    handles = drawn if len(counts) > 1 else [drawn]
    return [handle.patches[0] for handle in handles]


def choose_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Returns edges of at most `bins` bins that cover the sorted `values` int [M] >= 0.

    Edges are halfway between integers, spaced evenly, or geometrically if the values span decades.
    """
    low, high = int(values[0]), int(values[-1])
    if high > _LOG_RATIO * max(1, low):
        steps = np.geomspace(max(1, low), high + 1, bins).round() - 0.5
        return np.unique([low - 0.5, *steps])
    width = -(-(high + 1 - low) // bins)
    return np.arange(low, high + 1 + width, width) - 0.5


def _note_limits(axis: Any, limits: Sequence[int], on_scale: Sequence[int]) -> None:
    lines = []
    if on_scale:
        lines.append(f"dotted: row limit {', '.join(f'{limit:,}' for limit in on_scale)}")
    if off_scale := [limit for limit in limits if limit not in on_scale]:
        lines.append(f"off scale: row limit {', '.join(f'{limit:,}' for limit in off_scale)}")
    axis.text(
        0.98,
        0.97,
        "\n".join(lines),
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "lightgrey", "alpha": 0.9},
    )
