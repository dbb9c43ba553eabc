"""Draws the frames of a clip, or several images, next to each other in a figure."""

from __future__ import annotations

from typing import Any

import numpy as np

COLUMNS = 8
MAX_FRAMES = 16


def pick_frames(count: int) -> np.ndarray:
    """Returns the indices of at most `MAX_FRAMES` evenly spaced frames of a clip of `count` frames."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int))


def sheet_height(count: int) -> float:
    """Returns the height in inches that `draw_frames` needs for `count` frames."""
    return 1.2 * _rows(count) if count > 1 else 1.0


def draw_frames(figure: Any, frames: np.ndarray, times: np.ndarray | None) -> None:
    """Draws at most `MAX_FRAMES` of the frames uint8 [T, H, W, 3] in a matplotlib (sub)figure.

    Args:
      times: float [T], timestamps in seconds, drawn above the frames; None for images. The only frame
        of a clip has no timestamp.
    """
    axes = figure.subplots(_rows(len(frames)), COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, pick_frames(len(frames)), strict=False):
        axis.imshow(frames[index])
        if times is not None and len(frames) > 1:
            axis.set_title(f"{times[index]:.2f} s", fontsize=6)


def _rows(count: int) -> int:
    return -(-min(count, MAX_FRAMES) // COLUMNS)
