"""A short form of `python -m tests.fuzz`: damage never escapes the accounting, or passes unnoticed."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import FUZZERS
from tests.fuzz.damage import ESCAPE, SILENT


@pytest.mark.parametrize(("name", "count"), [("media", 120), ("records", 2000), ("state", 40)])
def test_damage_is_counted_and_never_escapes(name, count, tmp_path):
    outcomes = FUZZERS[name](seed=0, count=count, folder=tmp_path)
    assert outcomes[ESCAPE] == outcomes[SILENT] == 0
    assert outcomes.total() >= count
    assert len([outcome for outcome, number in outcomes.items() if number]) >= 4
    if name != "state":
        assert outcomes["read" if name == "media" else "used"] > count // 20
