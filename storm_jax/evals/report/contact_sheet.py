"""A picture of what a model saw, was asked and said."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np

from storm_jax.media.contact_sheet import draw_frames, sheet_height
from storm_jax.text.sample import PLACEHOLDER

WIDTH, LINES = 120, 4  # of the texts above a panel, in letters


@dataclasses.dataclass(frozen=True, kw_only=True)
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

    titles = [_title(panel) for panel in panels]
    heights = [
        0.6 + 0.15 * len(title) + sheet_height(len(panel.frames))
        for panel, title in zip(panels, titles, strict=True)
    ]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    for part, panel, title in zip(rows, panels, titles, strict=True):
        colour = "darkgreen" if panel.right else "firebrick"
        text = part.suptitle("\n".join(title), fontsize=9, color=colour)
        text.set_parse_math(False)  # a price is no formula
        draw_frames(part, panel.frames, panel.times)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        partial = path.with_suffix(f".{os.getpid()}.png")
        figure.savefig(partial, dpi=110)
        partial.rename(path)
    pyplot.close(figure)


def _title(panel: Panel) -> list[str]:
    """The lines above a panel."""
    question = " ".join(PLACEHOLDER.sub("", panel.question).split())
    asked = textwrap.wrap(f"{panel.title}: {question}", WIDTH, max_lines=LINES)
    said = textwrap.wrap(
        f"answer {panel.answer!r}, model {panel.prediction!r}", WIDTH, max_lines=LINES
    )
    return [*asked, *said]
