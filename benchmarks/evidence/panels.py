"""Figures with a panel of accuracies for each family of questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(families: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure and its panels side by side, titled, with accuracy in percent on a shared axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(families), 4.2), layout="constrained")
    axes = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    axes[0].set_ylabel("accuracy")
    for axis, family in zip(axes, families, strict=True):
        axis.set_title(family)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
