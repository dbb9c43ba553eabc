"""Packing: every sample is in exactly one row and fits, by first fit among the open rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig
from storm_jax.data import packing
from storm_jax.data.packing import plan_rows, smallest_fit
from storm_jax.data.rows import RowShape

PROPERTY = settings(max_examples=80, derandomize=True, database=None)
TOKENS, FRAMES = 50, 12
LARGE, SMALL = (
    RowShape(
        tokens=tokens,
        frames=frames,
        image_size=4,
        grid=Grid.square(2),
        compressions=(CompressionConfig(num_frames=4),),
    )
    for tokens, frames in ((TOKENS, FRAMES), (TOKENS // 2, FRAMES // 4))
)
SHAPES = st.sampled_from([(LARGE,), (SMALL, LARGE)])


@st.composite
def plans(draw) -> tuple[np.ndarray, list[int]]:
    """Lengths of samples, and an order of some of them."""
    pair = st.tuples(st.integers(1, TOKENS), st.integers(0, FRAMES))
    lengths = draw(st.lists(pair, min_size=1, max_size=120))
    order = draw(st.permutations(range(len(lengths))))
    return np.array(lengths, np.int64), order[: draw(st.integers(0, len(order)))]


def first_fit(lengths: np.ndarray, order: list[int], shapes, open_rows: int) -> list[list[int]]:
    """Reference implementation: the last `open_rows` rows are open."""
    rows: list[tuple[RowShape, list[int]]] = []
    for index in order:
        for shape, row in rows[-open_rows:]:
            if ((lengths[[*row, index]].sum(0)) <= (shape.tokens, shape.frames)).all():
                row.append(index)
                break
        else:
            fits = [s for s in shapes if (lengths[index] <= (s.tokens, s.frames)).all()]
            rows.append((fits[0], [index]))
    return [row for _, row in rows]


@PROPERTY
@given(plans(), SHAPES)
def test_each_sample_is_in_exactly_one_row(plan, shapes):
    lengths, order = plan
    rows = plan_rows(lengths, order, shapes)
    assert sorted(index for row in rows for index in row) == sorted(order)
    assert all(rows)


@PROPERTY
@given(plans(), SHAPES)
def test_no_row_exceeds_its_capacity_and_the_smallest_shape_is_chosen(plan, shapes):
    lengths, order = plan
    rows = plan_rows(lengths, order, shapes)
    totals = np.array([lengths[row].sum(0) for row in rows]).reshape(-1, 2)
    for total, number in zip(totals, smallest_fit(totals, shapes), strict=True):
        fits = [(total <= (s.tokens, s.frames)).all() for s in shapes]
        assert any(fits) and number == fits.index(True)


@PROPERTY
@given(plans(), SHAPES, st.sampled_from([1, 3, 64]))
def test_rows_are_filled_by_first_fit_among_the_open_ones(plan, shapes, open_rows: int):
    lengths, order = plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        rows = plan_rows(lengths, order, shapes)
    assert rows == first_fit(lengths, order, shapes, open_rows)


@PROPERTY
@given(plans())
def test_planning_is_deterministic_and_does_not_modify_lengths(plan):
    lengths, order = plan
    before = lengths.copy()
    first = plan_rows(lengths, order, [LARGE])
    assert plan_rows(lengths, iter(order), [LARGE]) == first
    np.testing.assert_array_equal(lengths, before)


def test_full_samples_get_a_row_each_and_small_ones_share_rows():
    full = np.array([[TOKENS, FRAMES]] * 2)
    assert plan_rows(full, range(2), [LARGE]) == [[0], [1]]
    assert plan_rows(np.full((4, 2), (TOKENS // 2, 1)), range(4), [LARGE]) == [
        [0, 1],
        [2, 3],
    ]
