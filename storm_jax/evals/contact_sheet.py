"""A picture of what a model saw, was asked and said."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from storm_jax.data.contact_sheet import draw_frames, sheet_height
from storm_jax.data.sample import PLACEHOLDER


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
    """Draws the panels below each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [0.75 + sheet_height(len(panel.frames)) for panel in panels]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    for part, panel in zip(rows, panels, strict=True):
        question = " ".join(PLACEHOLDER.sub("", panel.question).split())
        part.suptitle(
            f"{panel.title}: {question}\nanswer {panel.answer!r}, model {panel.prediction!r}",
            fontsize=9,
            color="darkgreen" if panel.right else "firebrick",
        )
        draw_frames(part, panel.frames, panel.times)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
