"""Errors for unusable data sets, and records of skipped samples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence


class DataError(ValueError):
    """A data set that cannot be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip:
    """A skipped sample.

    Attributes:
      source, sample: names of the source and the sample.
      where: file and line of the record.
      cause: category that skips are counted by, such as "missing".
      message: the full error.
      file: the medium that cannot be read; "" if the record itself is unusable.
    """

    source: str
    sample: str
    where: str
    cause: str
    message: str
    file: str = ""


def check_skips(skips: Sequence[Skip], read: int, max_fraction: float, subject: str) -> None:
    """Raises DataError if more than `max_fraction` of `read` samples (at least 100) were skipped."""
    if exceeds_limit(len(skips), read, max_fraction):
        causes = Counter(skip.cause for skip in skips)
        raise DataError(
            f"{subject} {len(skips)} unusable samples of {read} ({format_causes(causes)}), over "
            f"data.max_skip_fraction={max_fraction}; the first is {skips[0].where}: {skips[0].message}"
        )


def exceeds_limit(skipped: int, read: int, max_fraction: float) -> bool:
    """Returns whether too many of `read` samples were skipped; `read` counts as at least 100."""
    return skipped > max_fraction * max(read, 100)


def format_causes(causes: Counter[str]) -> str:
    """Returns a list such as "3 missing, 1 timeout", most common first."""
    return ", ".join(f"{n} {cause}" for cause, n in causes.most_common())
