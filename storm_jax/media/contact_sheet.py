"""Frames of a clip beside each other in a figure."""

from __future__ import annotations

from typing import Any

import numpy as np

COLUMNS = 8
MAX_FRAMES = 16


def pick_frames(count: int) -> np.ndarray:
    """Of long clips, the numbers of `MAX_FRAMES` evenly spaced frames."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int))


def sheet_height(count: int) -> float:
    """Inches that `draw_frames` needs for a clip of `count` frames."""
    return 1.2 * -(-len(pick_frames(count)) // COLUMNS)


def draw_frames(figure: Any, frames: np.ndarray, times: np.ndarray) -> None:
    """Draws frames uint8 [T, H, W, 3], shown at `times` in seconds, into a matplotlib (sub)figure."""
    picks = pick_frames(len(frames))
    axes = figure.subplots(-(-len(picks) // COLUMNS), COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, picks, strict=False):
        axis.imshow(frames[index])
        axis.set_title(f"{times[index]:.2f} s", fontsize=6)
