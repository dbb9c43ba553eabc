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


def write(records: Records, out: pathlib.Path) -> None:
    """Draws the plots in a folder, and the footage if it has been rendered there."""
    compared = [(STORM, "C0"), (DRAWN, "C9"), (BASELINE, "C3")]
    draw_budgets(records, "short", compared, out / "budgets.png")
    on_footage = list(zip(ON_FOOTAGE, ("C0", "C3"), strict=True))
    draw_budgets(records, "footage", on_footage, out / "budgets_on_footage.png")
    draw_frames(records, out / "frames.png")
    draw_mixers(records, out / "mixers.png")
    if (out / "footage" / "shapes.json").exists() and (out / "videos").exists():
        draw_clips(shapes.read_settings(out / "footage"), out / "footage.png")


def draw_budgets(
    records: Records, task: str, rows: Sequence[tuple[Row, str]], path: pathlib.Path
) -> None:
    """Accuracy over visual tokens, a line for each row, in its colour; the ceiling is a band."""
    if not any_of(records, [row for row, _ in rows]):
        return
    families = TASKS[task].videos
    line = {name: visual_tokens(name) for name in PLOTTED}
    figure, axes = panels(families)
    for axis, family in zip(axes, families, strict=True):
        limits = [ceiling(family, task, BUDGETS[name]) for name in line]
        _draw_band(axis, list(line.values()), family, limits)
        for row, colour in rows:
            values = {line[b]: accuracies(records, row, b, family) for b in line}
            _draw_line(axis, values, colour, row.title)
        if task == STORM.task:
            only = {line[b]: accuracies(records, specialist(b), b, family) for b in line}
            found = {tokens: values for tokens, values in only.items() if values}
            means = [statistics.fmean(values) for values in found.values()]
            axis.plot(list(found), means, "kx", label="STORM, that budget only")
        _label(axis, f"visual tokens of a clip of {TASKS[task].frames} frames", line.values())
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


def draw_mixers(records: Records, path: pathlib.Path) -> None:
    """Accuracy over visual tokens of each mixer, with its best learning rate."""
    best = {mixer: rate for mixer in MIXERS if (rate := best_rate(records, mixer)) is not None}
    if len(best) < 2:
        return
    families = TASKS["short"].videos
    line = {name: visual_tokens(name) for name in MIXER_TESTS}
    figure, axes = panels(families)
    for axis, family in zip(axes, families, strict=True):
        limits = [ceiling(family, "short", BUDGETS[name]) for name in line]
        _draw_band(axis, list(line.values()), family, limits)
        for number, (mixer, rate) in enumerate(best.items()):
            row = mixer_row(mixer, rate)
            values = {line[b]: accuracies(records, row, b, family) for b in line}
            _draw_line(axis, values, f"C{number}", mixer)
        _label(axis, f"visual tokens of a clip of {TASKS['short'].frames} frames", line.values())
        axis.invert_xaxis()
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
