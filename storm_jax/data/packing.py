"""Packs samples into rows by their lengths, before anything is decoded.

The result is the same for every process and worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from storm_jax.data.rows import RowShape

OPEN_ROWS = 64  # rows that may still receive samples


def smallest_fit(lengths: np.ndarray, shapes: Sequence[RowShape]) -> np.ndarray:
    """Returns the index of the first shape that fits each of `lengths` int [M, 2] (tokens, frames)."""
    slots = np.array([(shape.tokens, shape.frames) for shape in shapes])
    return (lengths.reshape(-1, 1, 2) <= slots).all(axis=2).argmax(axis=1)


def plan_rows(
    lengths: np.ndarray, order: Iterable[int], shapes: Sequence[RowShape]
) -> list[list[int]]:
    """Packs samples, in `order`, into rows by first fit, with at most `OPEN_ROWS` rows open at a time.

    A sample that fits no open row opens a new one of the first shape that it fits. If too many rows are
    open, the oldest is closed.

    Args:
      lengths: int [M, 2], token and frame slots of each sample; none exceeds the last shape.

    Returns:
      Sample indices of each row, in the order in which rows were opened. Each sample of `order` is in
      exactly one row.
    """
    rows: list[list[int]] = []
    homes = smallest_fit(lengths, shapes)
    free = np.zeros((0, 2), np.int64)  # of the open rows, oldest first
    for index in order:
        need = lengths[index]
        fits = np.flatnonzero((free >= need).all(axis=1))
        if len(fits):
            slot = int(fits[0])
        else:
            rows.append([])
            shape = shapes[homes[index]]
            free = np.concatenate([free, [[shape.tokens, shape.frames]]])[-OPEN_ROWS:]
            slot = len(free) - 1
        free[slot] -= need
        rows[len(rows) - len(free) + slot].append(int(index))
    return rows
