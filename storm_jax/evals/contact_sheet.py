"""A picture of what a model saw, was asked and said."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from storm_jax.data.sources import PLACEHOLDER

COLUMNS = 8
MAX_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Panel:
    """One question: its frames uint8 [T, H, W, 3] and their times in seconds."""

    title: str
    frames: np.ndarray
    times: np.ndarray
    question: str
    answer: str
    prediction: str
    right: bool


def draw_contact_sheet(path: pathlib.Path, panels: Sequence[Panel]) -> None:
    """Draws the panels below each other; of long clips, `MAX_FRAMES` evenly spaced frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picks = [_pick(len(panel.frames)) for panel in panels]
    heights = [0.75 + 1.2 * -(-len(pick) // COLUMNS) for pick in picks]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    for part, panel, pick in zip(rows, panels, picks, strict=True):
        question = " ".join(PLACEHOLDER.sub("", panel.question).split())
        part.suptitle(
            f"{panel.title}: {question}\nanswer {panel.answer!r}, model {panel.prediction!r}",
            fontsize=9,
            color="darkgreen" if panel.right else "firebrick",
        )
        axes = part.subplots(-(-len(pick) // COLUMNS), COLUMNS, squeeze=False).ravel()
        for axis in axes:
            axis.axis("off")
        for axis, index in zip(axes, pick, strict=False):
            axis.imshow(panel.frames[index])
            axis.set_title(f"{panel.times[index]:.2f} s", fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pick(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int))
