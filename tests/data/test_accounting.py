"""Per-source counts: samples read equal samples used plus skipped, also after a restart."""

from __future__ import annotations

import json

import pytest

from storm_jax.data.accounting import Accounting, Outcome
from storm_jax.data.skips import DataError, Skip, check_skips


def skip(cause: str = "missing", source: str = "a") -> Skip:
    return Skip(
        source=source,
        sample="x",
        where="a.json line 3",
        cause=cause,
        message="it is gone",
        file="a.mp4",
    )


OUTCOMES = [
    Outcome(
        source="a",
        sample="1",
        skip=None,
        tokens=10,
        frames=2,
        is_truncated=True,
        damaged=1,
        seconds=0.5,
    ),
    Outcome(source="a", sample="2", skip=skip(), seconds=0.25),
    Outcome(source="b", sample="3", skip=None, tokens=7),
    Outcome(source="a", sample="4", skip=skip("timeout"), seconds=1.0),
    Outcome(source="a", sample="5", skip=skip(), seconds=0.0),
]


def test_totals_add_up():
    accounting = Accounting(["a", "b", "c"])
    accounting.add(OUTCOMES)
    a, b, c = (accounting.totals[name] for name in "abc")
    assert (a.read, a.used, a.cut, a.damaged, a.tokens, a.frames, a.seconds) == (
        4,
        1,
        1,
        1,
        10,
        2,
        1.75,
    )
    assert dict(a.skipped) == {"missing": 2, "timeout": 1}
    assert (b.read, b.used, b.tokens) == (1, 1, 7) and c.read == 0
    for totals in (a, b, c):
        assert totals.read == totals.used + sum(totals.skipped.values())


def test_counts_continue_from_the_saved_state():
    whole, half = Accounting(["a", "b"]), Accounting(["a", "b"])
    whole.add(OUTCOMES)
    half.add(OUTCOMES[:2])
    resumed = Accounting(["a", "b"], [json.loads(json.dumps(half.state()))])
    resumed.add(OUTCOMES[2:])
    assert resumed.state() == whole.state()
    assert resumed.metrics()["data/a/skipped/missing"] == 2
    assert resumed.metrics()["data/b/tokens"] == 7


def test_table_has_a_line_per_source_with_its_causes():
    accounting = Accounting(["a", "long name"])
    accounting.add(OUTCOMES[:2])
    head, first, second = accounting.table().splitlines()
    assert head.split()[:4] == ["source", "read", "used", "skipped"]
    assert first.split()[:4] == ["a", "2", "1", "1"] and first.endswith("1 missing")
    assert second.startswith("long name")


@pytest.mark.parametrize(
    ("skipped", "used", "fraction", "fails"),
    [(20, 180, 0.1, False), (21, 179, 0.1, True), (1, 199, 0.0, True), (200, 0, 1.0, False)],
)
def test_one_bad_source_of_many_stops_a_run(skipped: int, used: int, fraction: float, fails: bool):
    accounting = Accounting(["a", "b"])
    accounting.add(
        [Outcome(source="a", sample="x", skip=skip())] * skipped
        + [Outcome(source="a", sample="y", skip=None)] * used
    )
    accounting.add([Outcome(source="b", sample="z", skip=None)] * 10_000)
    found = [skip()] * skipped
    if not fails:
        accounting.check(fraction, "training met")
        check_skips(found, skipped + used, fraction, "a.json has")
        return
    with pytest.raises(
        DataError, match=rf"training met {skipped} unusable .* 'a' \({skipped} missing"
    ):
        accounting.check(fraction, "training met")
    with pytest.raises(
        DataError, match=rf"has {skipped} unusable samples of 200 .* line 3: it is gone"
    ):
        check_skips(found, skipped + used, fraction, "a.json has")
