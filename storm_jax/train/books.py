"""What all processes have read and skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from storm_jax import distributed
from storm_jax.data.accounting import Accounting, Outcome
from storm_jax.data.skips import Skip
from storm_jax.train.skip_log import SkipLog


class Books:
    """Totals by source over all processes. Each process adds its outcomes; `exchange` makes them known to all.

    Args:
      sources: names of the data sources.
      subject: of the error about too many skips, such as "training met".
      state: result of `state()` to resume from.
    """

    def __init__(
        self,
        sources: Sequence[str],
        skip_log: SkipLog,
        max_skip_fraction: float,
        subject: str,
        state: Mapping[str, Any] | None = None,
    ):
        self._sources, self._skip_log = sources, skip_log
        self._max_skip_fraction, self._subject = max_skip_fraction, subject
        self._totals = Accounting(sources, [state] if state else [])
        self._new, self._new_skips = Accounting(sources), list[Skip]()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        outcomes = list(outcomes)
        self._new.add(outcomes)
        self._new_skips += [outcome.skip for outcome in outcomes if outcome.skip is not None]

    def exchange(self) -> None:
        """Sums what all processes have added and logs their skips. All processes call it at the same step.

        Raises:
          DataError: on all processes, if more than `max_skip_fraction` of a source was skipped.
        """
        mine = {
            "totals": self._new.state(),
            "skips": [dataclasses.asdict(skip) for skip in self._new_skips],
        }
        everyone = distributed.gather(mine)
        self._new, self._new_skips = Accounting(self._sources), []
        self._totals.merge(found["totals"] for found in everyone)
        self._skip_log.write([Skip(**skip) for found in everyone for skip in found["skips"]])
        self._totals.check(self._max_skip_fraction, self._subject)

    def state(self) -> dict[str, Any]:
        """The totals of all processes, plain JSON."""
        return self._totals.state()

    def metrics(self) -> dict[str, float]:
        return self._totals.metrics()

    def table(self) -> str:
        return self._totals.table()
