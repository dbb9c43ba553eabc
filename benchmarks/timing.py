"""Times programs next to each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Call = Callable[[], Any]
K = TypeVar("K", bound=Hashable)


def seconds_by_round(calls: Mapping[K, Call], rounds: int) -> dict[K, list[float]]:
    """Seconds of every call in each round. A round runs all of them, so that all see the same load; the first one is
    not counted."""
    found: dict[K, list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                found[key].append(time.perf_counter() - began)
    return found
