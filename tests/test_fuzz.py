"""A short form of `python -m tests.fuzz`: damaged media and records never escape the accounting."""

from __future__ import annotations

import pytest

from tests import fuzz


@pytest.mark.parametrize(("name", "count"), [("media", 120), ("records", 2000)])
def test_damage_is_counted_and_never_escapes(name, count, tmp_path):
    outcomes = fuzz.FUZZERS[name](seed=0, count=count, folder=tmp_path)
    assert outcomes[fuzz.ESCAPE] == 0
    assert outcomes["read" if name == "media" else "used"] > count // 20
    assert outcomes.total() >= count
    assert len(outcomes) >= 4
