"""Data sets and samples that cannot be used."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence


class DataError(ValueError):
    """A dataset that cannot be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip:
    """A sample that cannot be used, and why.

    Attributes:
      source, sample: names.
      where: file and line of its record.
      cause: the word it is counted under.
      file: the medium that cannot be read; "" = it is the record itself.
    """

    source: str
    sample: str
    where: str
    cause: str
    message: str
    file: str = ""


def check_skips(skips: Sequence[Skip], read: int, max_fraction: float, subject: str) -> None:
    """Raises DataError when more than the fraction (of at least 100 samples) was skipped."""
    if exceeds_limit(len(skips), read, max_fraction):
        causes = Counter(skip.cause for skip in skips)
        raise DataError(
            f"{subject} {len(skips)} unusable samples of {read} ({format_causes(causes)}), over "
            f"data.max_skip_fraction={max_fraction}; the first, {skips[0].where}: {skips[0].message}"
        )


def exceeds_limit(skipped: int, read: int, max_fraction: float) -> bool:
    return skipped > max_fraction * max(read, 100)


def format_causes(causes: Counter[str]) -> str:
    return ", ".join(f"{n} {cause}" for cause, n in causes.most_common())
