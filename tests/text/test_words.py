"""Numbers and times are written as the models' own processors write them."""

from __future__ import annotations

import pytest
from num2words import num2words

from storm_jax.text.words import clock, duration, in_words


@pytest.mark.parametrize("numbers", [range(1_300), range(1_300, 1_000_000, 977)])
def test_numbers_in_words(numbers):
    assert [in_words(n) for n in numbers] == [num2words(n) for n in numbers]


def test_times():
    assert [clock(t) for t in (0, 59.9, 60, 3_725.5)] == ["00:00", "00:59", "01:00", "62:05"]
    assert [duration(t) for t in (0.4, 75, 36_061)] == ["0:00:00", "0:01:15", "10:01:01"]
