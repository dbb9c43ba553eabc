"""Progress: a bar on a terminal, lines in a log, and a time left that excludes set-up."""

from __future__ import annotations

import io
import sys

import pytest

from storm_jax import progress
from storm_jax.progress import with_progress


class Clock:
    """Seconds that advance only while working."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: list[float]):
        for number, duration in enumerate(seconds):
            self.now += duration
            yield number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_lines_every_few_seconds_without_set_up_time(clock: Clock, capsys):
    items = clock.work([1000.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert list(with_progress(items, 6, "reading", unit="files")) == list(range(6))
    assert capsys.readouterr().out.splitlines() == [
        "reading: 2 of 6 files, 8 s left",
        "reading: 5 of 6 files, 2 s left",
    ]


def test_items_of_several_units(clock: Clock, capsys):
    assert (
        len(list(with_progress(clock.work([9.0] * 3), 25, "reading", unit="files", size=10))) == 3
    )
    assert capsys.readouterr().out.splitlines() == [
        "reading: 20 of 25 files, 4 s left",
        "reading: 25 of 25 files, 0 s left",
    ]


def test_fast_work_prints_nothing(clock: Clock, capsys):
    assert list(with_progress(clock.work([0.1] * 9), 9, "reading", unit="files")) == [*range(9)]
    assert capsys.readouterr() == ("", "")
    assert list(with_progress([], 0, "reading", unit="files")) == []


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(with_progress(range(25), 25, "reading", unit="files")) == list(range(25))
    assert "reading: 100%" in terminal.getvalue() and "25/25" in terminal.getvalue()
