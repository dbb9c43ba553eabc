"""A line now and then for work that takes long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def with_progress(
    items: Iterable[T],
    total: int,
    line: str,
    *,
    size: int = 1,
    every: float = 5.0,
    tells_end: bool = False,
) -> Iterator[T]:
    """The items as they come; behind one of them, now and then, a line.

    Args:
      total: how many there will be, each counting `size`; the last may count less.
      line: a format of `done`, `total` and `left` (seconds).
      every: seconds between lines.
      tells_end: whether the last item has a line, too, however short it took.
    """
    began = shown = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        done, now = min(total, number * size), time.monotonic()
        if now - shown > every or (tells_end and done == total):
            left = (now - began) / done * (total - done)
            print(line.format(done=done, total=total, left=left), flush=True)
            shown = now
