"""The books of several processes: each row is counted once, and all that hold a row must have read it."""

from __future__ import annotations

import json

import pytest

from storm_jax import distributed
from storm_jax.data.accounting import Outcome
from storm_jax.data.skips import DataError, Skip
from storm_jax.files import read_lines
from storm_jax.sharding import LocalRows
from storm_jax.train.books import Books
from storm_jax.train.skip_log import SkipLog

READ = Outcome(source="a", sample="1", skip=None, tokens=5)
SKIP = Skip(
    source="a",
    sample="1",
    where="a.json record 1",
    cause="timeout",
    message="too slow",
    file="a.mp4",
)
FAILED = Outcome(source="a", sample="1", skip=SKIP)
# Both processes hold row 0, and each another row.
HELD, COUNTED = ([0, 1], [0, 2]), ([0, 1], [2])


@pytest.fixture
def exchange(monkeypatch, tmp_path):
    """Adds two batches to the books of each of two processes, which then exchange them; returns the books."""

    def exchange(*batches) -> list[Books]:
        log = SkipLog(tmp_path)
        everyone = [
            Books(["a"], LocalRows(3, held, frozenset(counted)), log, 0.5, "met")
            for held, counted in zip(HELD, COUNTED, strict=True)
        ]
        sent: list = []
        for books, held, batch in zip(everyone, HELD, batches, strict=True):
            books.add({row: [READ] for row in held})
            books.add(batch)
            monkeypatch.setattr(distributed, "gather", lambda mine: sent.append(mine) or [])
            books.exchange()  # only to see what it sends
        monkeypatch.setattr(distributed, "gather", lambda _: json.loads(json.dumps(sent)))
        for books in everyone:
            books.exchange()
        return everyone

    return exchange


def test_a_row_of_two_processes_is_counted_once(exchange, tmp_path):
    for books in exchange({0: [FAILED], 1: [READ]}, {0: [FAILED], 2: [READ, READ]}):
        totals = books.state()["a"]
        assert (totals["read"], totals["used"], totals["skipped"]) == (7, 6, {"timeout": 1})
    (line,) = read_lines(tmp_path / "skipped.jsonl")
    assert line["where"] == SKIP.where


@pytest.mark.parametrize("failed", [0, 1])
def test_a_sample_that_only_one_of_two_processes_could_read_is_an_error(exchange, tmp_path, failed):
    """Their copies of the model differ. The file is logged, so that none reads it after a restart."""
    batches = [{0: [READ], 1: [READ]}, {0: [READ], 2: [READ]}]
    batches[failed][0] = [FAILED]
    wanted = (
        rf"process {failed} could not read a.json record 1 and process {1 - failed}, .* too slow"
    )
    with pytest.raises(DataError, match=wanted):
        exchange(*batches)
    assert SkipLog(tmp_path).lasting_failures == {"a.mp4": "timeout"}


def test_a_sample_that_fails_in_a_row_of_one_process_is_no_error(exchange):
    exchange({0: [READ], 1: [FAILED]}, {0: [READ], 2: [FAILED]})
