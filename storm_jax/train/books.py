"""What all processes have read and skipped."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from storm_jax import distributed
from storm_jax.data.accounting import Accounting, Outcome
from storm_jax.data.skips import DataError, Skip
from storm_jax.sharding import LocalRows
from storm_jax.train.skip_log import SkipLog


class Books:
    """Totals by source over all processes. Each process adds its outcomes; `exchange` makes them known to all.

    Args:
      sources: names of the data sources.
      rows: of a batch, those of this process.
      subject: of the error about too many skips, such as "training met".
      state: result of `state()` to resume from.
    """

    def __init__(
        self,
        sources: Sequence[str],
        rows: LocalRows,
        skip_log: SkipLog,
        max_skip_fraction: float,
        subject: str,
        state: Mapping[str, Any] | None = None,
    ):
        self._sources, self._rows, self._skip_log = sources, rows, skip_log
        self._max_skip_fraction, self._subject = max_skip_fraction, subject
        self._totals = Accounting(sources, [state] if state else [])
        self._clear()

    def _clear(self) -> None:
        self._new, self._batches = Accounting(self._sources), 0
        self._skips: list[tuple[int, int, Skip]] = []  # with the numbers of batch and row

    def add(self, batch: Mapping[int, Sequence[Outcome]]) -> None:
        """Adds the outcomes of a batch, by number of the row."""
        for row, outcomes in batch.items():
            if row in self._rows.counted:
                self._new.add(outcomes)
            skips = [outcome.skip for outcome in outcomes if outcome.skip is not None]
            self._skips += [(self._batches, row, skip) for skip in skips]
        self._batches += 1

    def exchange(self) -> None:
        """Sums what all processes have added and logs their skips. All processes call it at the same step.

        Raises:
          DataError: on all processes, if more than `max_skip_fraction` of a source was skipped, or if only some
            of the processes that hold a row could read a sample of it.
        """
        mine = {
            "totals": self._new.state(),
            "skips": [(*place, dataclasses.asdict(skip)) for *place, skip in self._skips],
            "held": self._rows.held,
        }
        everyone = distributed.gather(mine)
        self._clear()
        self._totals.merge(found["totals"] for found in everyone)
        self._skip_log.write([Skip(**skip) for found in everyone for *_, skip in found["skips"]])
        _check_same_rows(everyone)
        self._totals.check(self._max_skip_fraction, self._subject)

    def state(self) -> dict[str, Any]:
        """The totals of all processes, plain JSON."""
        return self._totals.state()

    def metrics(self) -> dict[str, float]:
        return self._totals.metrics()

    def table(self) -> str:
        return self._totals.table()


def _check_same_rows(everyone: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError if a sample failed on one of the processes that hold its row, and not on another."""
    failed = [
        {(batch, row, skip["where"]): skip["message"] for batch, row, skip in found["skips"]}
        for found in everyone
    ]
    for (number, its), (other, found) in itertools.permutations(enumerate(failed), 2):
        held = everyone[other]["held"]
        for (batch, row, where), message in its.items():
            if row in held and (batch, row, where) not in found:
                raise DataError(
                    f"process {number} could not read {where} and process {other}, which holds the same row, "
                    f"could: {message}. The same command resumes from the last checkpoint"
                )
