"""Scoring: what counts as right, and how sure one can be."""

from __future__ import annotations

import pytest

from storm_jax.data.sample import Sample
from storm_jax.evals.benchmark import Question, exact_match, wilson_interval

SAMPLE = Sample("1", (), (), {})


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("top left", True),
        (" Top-Left. ", True),
        ("top", False),
        ("top left left", False),
        ("", False),
    ],
)
def test_free_answers_match_but_for_case_and_punctuation(text, right):
    assert exact_match(Question(SAMPLE, "top left", (), "place"), text) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True), ("b.", True), ("(B)", True), ("3", True), ("B. 3", True),
        ("A", False), ("A. 3", False), ("B. 2", False), ("AB", False), ("", False),
    ],
)  # fmt: skip
def test_choices_match_by_letter_or_option_and_not_by_both_at_odds(text, right):
    assert exact_match(Question(SAMPLE, "B", ("2", "3", "1", "4"), "count"), text) == right


def test_wilson_interval_is_the_published_one():
    low, high = wilson_interval(8, 10)  # Brown, Cai and DasGupta (2001): 0.490 to 0.943
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == pytest.approx(1)
    assert wilson_interval(0, 0) == (0, 1)
