"""The thread that owns the model: it runs an engine, and other work on the devices between its steps."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from absl import logging

from storm_jax.inference.engine import Engine, Request
from storm_jax.serve.errors import ApiError

_Result = TypeVar("_Result")


class EngineThread:
    """Runs an engine for coroutines of one event loop.

    A step that fails ends the requests that were running with an error; the next ones get a new engine.
    """

    def __init__(self, make_engine: Callable[[], Engine]):
        self._make_engine = make_engine
        self._engine = make_engine()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._news: dict[Request, Callable[[Exception | None], Any]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._engine.waiting

    @property
    def running(self) -> int:
        return self._engine.running

    async def call(self, function: Callable[[], _Result]) -> _Result:
        """Runs a function in the thread, between two steps."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_Result] = loop.create_future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:
                _set(loop, done, error=error)
            else:
                _set(loop, done, result=result)

        self._jobs.put(job)
        return await done

    async def answer(self, request: Request) -> AsyncGenerator[list[int]]:
        """Yields the tokens of an answer as they are written; leaving the loop early cancels it.

        Raises:
          ApiError: the prompt does not fit into a row, or a step of the engine failed.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Exception | None]()
        self._news[request] = lambda error: loop.call_soon_threadsafe(news.put_nowait, error)
        done = 0
        try:
            try:
                await self.call(lambda: self._engine.submit(request))
            except ValueError as error:
                raise ApiError(400, str(error)) from None
            while True:
                failed = await news.get()
                if failed:
                    raise ApiError(500, "the model failed; the server's log says why") from failed
                written, finish = list(request.written), request.finish
                if len(written) > done:
                    yield written[done:]
                    done = len(written)
                if finish and len(request.written) == done:
                    return
        finally:
            self._news.pop(request, None)
            request.cancel()

    def close(self) -> None:
        """Stops the thread; requests that are not finished stay so."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            while self._engine.is_idle or not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    return
                job()
            failed: Exception | None = None
            try:
                changed = self._engine.step()
            except Exception as error:
                logging.exception("a step of the engine failed")
                self._engine = self._make_engine()
                changed, failed = list(self._news), error
            for request in changed:
                if tell := self._news.get(request):
                    tell(failed)


def _set(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future,
    result: Any = None,
    error: BaseException | None = None,
) -> None:
    def set_result() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    loop.call_soon_threadsafe(set_result)
