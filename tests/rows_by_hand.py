"""Builds rows from samples for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storm_jax.data.rows import RowSample, RowShape, empty_rows, fill_row


def build_rows(
    samples: Sequence[Sequence[RowSample | None]], pad_id: int, shape: RowShape
) -> dict[str, np.ndarray]:
    """Builds a batch with one row per list of samples."""
    batch = empty_rows(len(samples), pad_id, shape)
    for number, members in enumerate(samples):
        fill_row({name: array[number] for name, array in batch.items()}, members, shape)
    return batch


def build_row(
    samples: Sequence[RowSample | None], pad_id: int, shape: RowShape
) -> dict[str, np.ndarray]:
    """Builds one row, without a batch axis."""
    return {name: array[0] for name, array in build_rows([samples], pad_id, shape).items()}
