"""Visual tables of the media that were asked about last."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Value = TypeVar("_Value", bound=Sized)


class TableCache(Generic[_Value]):
    """Keeps values up to a number of bytes, and drops those that were used least recently.

    Several coroutines that want the same value at once make it once.

    Attributes:
      hits, misses: how often a value was there, and was not.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._values: OrderedDict[Hashable, _Value] = OrderedDict()
        self._making: dict[Hashable, asyncio.Task[_Value]] = {}
        self.hits = self.misses = 0

    @property
    def making(self) -> int:
        """Values being made, including those whose callers have left."""
        return len(self._making)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._values.values())

    async def get(self, key: Hashable, make: Callable[[], Awaitable[_Value]]) -> _Value:
        """The value of a key, from `make` if it is not kept. An error of `make` is raised for all who wait."""
        if key in self._values:
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key]
        if key in self._making:
            self.hits += 1
        else:
            self.misses += 1
            task = asyncio.ensure_future(make())
            self._making[key] = task
            task.add_done_callback(lambda done: self._made(key, done))
        # One that leaves does not stop the others.
        return await asyncio.shield(self._making[key])

    def _made(self, key: Hashable, task: asyncio.Task[_Value]) -> None:
        del self._making[key]
        if task.cancelled() or task.exception():
            return
        value = task.result()
        if value.nbytes > self._max_bytes:
            return
        self._values[key] = value
        while self.nbytes > self._max_bytes:
            self._values.popitem(last=False)
