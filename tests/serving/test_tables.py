"""The cache of encoded media: bounded bytes, least recently used first, each made once."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm_jax.serve.tables import TableCache


@dataclasses.dataclass
class Table:
    nbytes: int


def make_of(size: int, made: list | None = None):
    async def make() -> Table:
        await asyncio.sleep(0)
        if made is not None:
            made.append(size)
        return Table(size)

    return make


@given(
    uses=st.lists(st.integers(0, 9), max_size=40),
    sizes=st.lists(st.integers(0, 12), min_size=10, max_size=10),
)
def test_it_keeps_what_was_used_last(uses, sizes):
    """Compared with a list that does the same by hand."""

    async def run() -> None:
        cache: TableCache[Table] = TableCache(20)
        kept: list[int] = []
        for key in uses:
            made: list[int] = []
            await cache.get(key, make_of(sizes[key], made))
            assert bool(made) == (key not in kept)
            kept = [other for other in kept if other != key] + [key]
            while sum(sizes[other] for other in kept) > 20:
                kept.pop(0)
            assert cache.nbytes == sum(sizes[other] for other in kept)
        assert cache.hits + cache.misses == len(uses)

    asyncio.run(run())


def test_what_several_want_at_once_is_made_once():
    async def run() -> None:
        cache, made = TableCache(100), []
        tables = await asyncio.gather(*(cache.get("a", make_of(5, made)) for _ in range(4)))
        assert made == [5] and all(table is tables[0] for table in tables)
        assert (cache.hits, cache.misses) == (3, 1)

    asyncio.run(run())


def test_one_who_leaves_does_not_stop_the_others():
    async def run() -> None:
        cache, made = TableCache(100), []
        first = asyncio.ensure_future(cache.get("a", make_of(5, made)))
        second = asyncio.ensure_future(cache.get("a", make_of(5, made)))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).nbytes == 5 and made == [5]

    asyncio.run(run())


def test_an_error_is_not_kept():
    async def fail() -> Table:
        raise ValueError("broken")

    async def run() -> None:
        cache: TableCache[Table] = TableCache(100)
        for _ in range(2):
            with pytest.raises(ValueError, match="broken"):
                await cache.get("a", fail)
        assert (await cache.get("a", make_of(5))).nbytes == 5

    asyncio.run(run())
