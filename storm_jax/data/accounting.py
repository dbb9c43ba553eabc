"""Per-source counts of samples read, used and skipped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from storm_jax.data.skips import DataError, Skip, exceeds_limit, format_causes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of reading one sample.

    Attributes:
      source, sample: names of the source and the sample.
      skip: why it was skipped; None if it was used.
      tokens, frames: slots that it fills.
      is_truncated: whether its last answer was truncated.
      damaged: unreadable frames that were replaced by a neighbour.
      seconds: time spent reading it.
    """

    source: str
    sample: str
    skip: Skip | None
    tokens: int = 0
    frames: int = 0
    is_truncated: bool = False
    damaged: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Sums over the outcomes of one source.

    `read` equals `used` plus the sum of `skipped`; `cut` counts truncated answers.
    """

    read: int = 0
    used: int = 0
    cut: int = 0
    tokens: int = 0
    frames: int = 0
    damaged: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.read += 1
        self.seconds += outcome.seconds
        if outcome.skip is not None:
            self.skipped[outcome.skip.cause] += 1
            return
        self.used += 1
        self.cut += outcome.is_truncated
        self.tokens += outcome.tokens
        self.frames += outcome.frames
        self.damaged += outcome.damaged

    def merge(self, values: Mapping[str, Any]) -> None:
        """Adds the fields of other totals."""
        for field, value in values.items():
            if field == "skipped":
                self.skipped.update(value)
            else:
                setattr(self, field, getattr(self, field) + value)


class Accounting:
    """Totals by source. They are saved in checkpoints, so a resumed run continues its counts.

    Args:
      states: results of `state()`, which are summed.
    """

    def __init__(self, sources: Sequence[str], states: Iterable[Mapping[str, Any]] = ()):
        self.totals = {name: Totals() for name in sources}
        self.merge(states)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            self.totals[outcome.source].add(outcome)

    def merge(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Adds results of `state()`."""
        for state in states:
            for name, values in state.items():
                self.totals.setdefault(name, Totals()).merge(values)

    def state(self) -> dict[str, Any]:
        """Returns the totals as plain JSON."""
        return {
            name: {**vars(totals), "skipped": dict(totals.skipped)}
            for name, totals in self.totals.items()
        }

    def metrics(self) -> dict[str, float]:
        """Returns the totals by metric name: "data/NAME/used", "data/NAME/skipped/missing" and so on."""
        found: dict[str, float] = {}
        for name, values in self.state().items():
            skipped = values.pop("skipped")
            found |= {f"data/{name}/{field}": value for field, value in values.items()}
            found |= {f"data/{name}/skipped/{cause}": n for cause, n in skipped.items()}
        return found

    def check(self, max_skip_fraction: float, subject: str) -> None:
        """Raises DataError if more than `max_skip_fraction` of any source was skipped.

        Sources with fewer than 100 samples read are treated as having 100.
        """
        for name, totals in self.totals.items():
            skipped = sum(totals.skipped.values())
            if exceeds_limit(skipped, totals.read, max_skip_fraction):
                raise DataError(
                    f"{subject} {skipped} unusable samples of {totals.read} in data source {name!r} "
                    f"({format_causes(totals.skipped)}), over data.max_skip_fraction={max_skip_fraction}"
                )

    def table(self) -> str:
        """Returns a text table with one line per source."""
        headers = (
            "source",
            "read",
            "used",
            "skipped",
            "truncated",
            "tokens",
            "frames",
            "damaged",
            "seconds",
        )
        rows: list[tuple[str, ...]] = [headers]
        for name, t in self.totals.items():
            counts = (t.read, t.used, sum(t.skipped.values()), t.cut, t.tokens, t.frames, t.damaged)
            rows.append((name, *(f"{n:,}" for n in counts), f"{t.seconds:,.1f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(headers))]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            causes = self.totals[row[0]].skipped if row is not headers else Counter()
            lines.append("  ".join(cells) + (f"   {format_causes(causes)}" if causes else ""))
        return "\n".join(lines)
