"""Progress of long-running work: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_SECONDS_PER_LINE = 5.0


def with_progress(
    items: Iterable[T], total: int, description: str, *, unit: str, size: int = 1
) -> Iterator[T]:
    """Yields the items and reports progress: a tqdm bar on a terminal, plain lines otherwise.

    The time left is estimated from the first item on, so set-up before it does not count.

    Args:
      total: number of units in all items together.
      description: what is being done, such as "rendering".
      unit: plural name of what is counted, such as "samples".
      size: units per item; the last item may have fewer.
    """
    report = _bar if sys.stderr.isatty() else _lines
    yield from report(items, total, description, unit, size)


def _bar(items: Iterable[T], total: int, description: str, unit: str, size: int) -> Iterator[T]:
    bar = None
    try:
        for number, item in enumerate(items, start=1):
            yield item
            done = min(total, number * size)
            if bar is None:
                bar = tqdm(
                    total=total,
                    initial=done,
                    desc=description,
                    unit=f" {unit}",
                    dynamic_ncols=True,
                )
            else:
                bar.update(done - bar.n)
    finally:
        if bar is not None:
            bar.close()


def _lines(items: Iterable[T], total: int, description: str, unit: str, size: int) -> Iterator[T]:
    began = printed = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        done, now = min(total, number * size), time.monotonic()
        if number == 1:
            began = now
        elif now - printed > _SECONDS_PER_LINE:
            left = (now - began) / (done - size) * (total - done)
            print(f"{description}: {done:,} of {total:,} {unit}, {left:.0f} s left", flush=True)
            printed = now
