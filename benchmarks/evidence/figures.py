"""Plots of the records, and pictures of the clips."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.evidence.panels import panels
from benchmarks.evidence.rows import (
    BASELINE,
    BUDGETS,
    DRAWN,
    MIXER_TESTS,
    MIXERS,
    ON_FOOTAGE,
    READS,
    STORM,
    TABLES,
    TASKS,
    Row,
    mixer_row,
    reader,
    specialist,
)
from benchmarks.evidence.scores import (
    Records,
    accuracies,
    any_of,
    best_rate,
    ceiling,
    frames_ceiling,
    visual_tokens,
)
from storm_jax.tasks import shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLIPS = 4  # test samples that the picture of footage shows, if they are videos
PLOTTED = "1x", "2x", "4x", "8x", "16x", "32x", "64x"  # one for each number of tokens
Line = tuple[Row, str, str]  # of a plot: with its colour and label


def write(records: Records, out: pathlib.Path) -> None:
    """Draws the plots in a folder, and the footage if it has been rendered there."""
    compared = [
        (STORM, "C0", STORM.title),
        (DRAWN, "C9", DRAWN.title),
        (BASELINE, "C3", BASELINE.title),
    ]
    draw_budgets(records, "short", PLOTTED, compared, out / "budgets.png", with_specialists=True)
    on_footage = [
        (row, colour, row.title) for row, colour in zip(ON_FOOTAGE, ("C0", "C3"), strict=True)
    ]
    draw_budgets(records, "footage", PLOTTED, on_footage, out / "budgets_on_footage.png")
    draw_frames(records, out / "frames.png")
    mixers = [
        (mixer_row(mixer, rate), f"C{number}", mixer)
        for number, mixer in enumerate(MIXERS)
        if (rate := best_rate(records, mixer)) is not None
    ]
    if len(mixers) > 1:
        draw_budgets(records, "short", MIXER_TESTS, mixers, out / "mixers.png")
    if (out / "footage" / "shapes.json").exists() and (out / "videos").exists():
        draw_clips(shapes.read_settings(out / "footage"), out / "footage.png")


def draw_budgets(
    records: Records,
    task: str,
    tests: Sequence[str],
    lines: Sequence[Line],
    path: pathlib.Path,
    *,
    with_specialists: bool = False,
) -> None:
    """Accuracy over visual tokens; the ceiling is a band."""
    if not any_of(records, [row for row, _, _ in lines]):
        return
    families = TASKS[task].videos
    tokens = {name: visual_tokens(name) for name in tests}
    figure, axes = panels(families)
    for axis, family in zip(axes, families, strict=True):
        limits = [ceiling(family, task, BUDGETS[name]) for name in tests]
        _draw_band(axis, list(tokens.values()), family, limits)
        for row, colour, label in lines:
            values = {tokens[b]: accuracies(records, row, b, family) for b in tests}
            _draw_line(axis, values, colour, label)
        if with_specialists:
            only = {tokens[b]: accuracies(records, specialist(b), b, family) for b in tests}
            found = {place: values for place, values in only.items() if values}
            means = [statistics.fmean(values) for values in found.values()]
            axis.plot(list(found), means, "kx", label="STORM, that budget only")
        _label(axis, f"visual tokens of a clip of {TASKS[task].frames} frames", tokens.values())
        axis.invert_xaxis()
    _save(figure, path)


def draw_frames(records: Records, path: pathlib.Path) -> None:
    """Accuracy over the frames that are read of a long clip, with equal numbers of visual tokens."""
    if not any_of(records, TABLES["frames"]):
        return
    families = TASKS["long"].families
    frames = {read: compression.num_frames for read, compression in READS.items()}
    figure, axes = panels(families)
    for axis, family in zip(axes, families, strict=True):
        limits = [ceiling(family, "long", compression) for compression in READS.values()]
        _draw_band(axis, list(frames.values()), family, limits)
        best = [frames_ceiling(family, read) for read in READS]
        axis.plot(list(frames.values()), best, "k:", label="what the frames show")
        for start, colour, title in ((STORM, "C0", "STORM"), (BASELINE, "C3", "MLP")):
            values = {
                frames[read]: accuracies(records, reader(start, read), read, family)
                for read in READS
            }
            _draw_line(axis, values, colour, title)
        tokens = visual_tokens(next(iter(READS)))
        _label(axis, f"frames read of 128, {tokens} visual tokens", frames.values())
    _save(figure, path)


def _draw_band(axis: Axes, places: Sequence[int], family: str, limits: Sequence[float]) -> None:
    chance = shapes.FAMILIES[family].chance
    axis.fill_between(places, chance, limits, color="0.9", label="without mixing, on textures")


def _draw_line(axis: Axes, values: Mapping[int, Sequence[float]], colour: str, title: str) -> None:
    """A line through the means, with the smallest and the largest value."""
    found = {place: each for place, each in values.items() if each}
    means = [statistics.fmean(each) for each in found.values()]
    low = [mean - min(each) for mean, each in zip(means, found.values(), strict=True)]
    high = [max(each) - mean for mean, each in zip(means, found.values(), strict=True)]
    axis.errorbar(
        list(found), means, yerr=[low, high], fmt="o-", color=colour, label=title, capsize=3
    )


def _label(axis: Axes, places_are: str, places: Iterable[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set(xlabel=places_are, ylim=(0, 1.05))
    axis.set_xticks(list(places), [str(place) for place in places])


def _save(figure: Figure, path: pathlib.Path) -> None:
    """With one legend for all panels, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 5)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=120)


def draw_clips(settings: shapes.Settings, path: pathlib.Path) -> None:
    """The first test clips of a task about videos, a line of frames each."""
    from matplotlib.figure import Figure

    samples = [shapes.render(settings, "test", index) for index in range(CLIPS)]
    videos = [sample for sample in samples if len(sample.frames) > 1]
    figure = Figure(figsize=(settings.frames * 0.6, len(videos) * 0.85), layout="constrained")
    axes = figure.subplots(len(videos), 1)
    for axis, sample in zip(axes, videos, strict=True):
        axis.imshow(np.concatenate(list(sample.frames), axis=1))
        axis.set_title(f"{sample.question} {sample.answer}", fontsize=8, loc="left", pad=2)
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
