"""A video that arrives over a WebSocket, frame by frame, and is asked about meanwhile.

    client                                     server
    session.config {fps, budget_tokens, ...}   session.created {mode}
    video.frame {data, time}
    video.query {text, max_tokens, ...}        response.start, response.text.delta {delta}, response.text.done {text, ...}
    video.done                                 session.done {...}

All messages are JSON objects with a `type`; what is wrong is answered with an `error`. The names are those of vLLM-omni.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from absl import logging
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, Field, ValidationError

from storm_jax.inference.generate import Sampling
from storm_jax.inference.streaming.stream import Stream
from storm_jax.serve.errors import ApiError
from storm_jax.serve.fields import Strict, check_text, from_base64
from storm_jax.serve.keys import is_key
from storm_jax.serve.service import DEFAULT_NEW_TOKENS, Service

IDLE = 60.0  # seconds without a message
WAITING = 8  # frames that wait for the model; older ones are dropped
_Body = TypeVar("_Body", bound=BaseModel)


class SessionConfig(Strict):
    type: Literal["session.config"]
    api_key: str = ""
    fps: float = Field(default=1.0, ge=0, le=30)
    budget_tokens: int = Field(default=4096, ge=1)
    policy: Literal["window", "stride", "merge"] = "window"
    recent: int = Field(default=16, ge=0)


class VideoFrame(Strict):
    """`data` is an image file in base64; `time` are seconds, by default those since the session began."""

    type: Literal["video.frame"]
    data: str
    time: float | None = Field(default=None, ge=0, le=1e7)


class VideoQuery(Strict):
    type: Literal["video.query"]
    text: str = Field(max_length=20_000)
    max_tokens: int = Field(default=DEFAULT_NEW_TOKENS, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class LiveSession:
    """One connection."""

    def __init__(self, service: Service, socket: WebSocket):
        self._service, self._socket = service, socket
        self._began = time.monotonic()
        self._frames: asyncio.Queue[VideoFrame] = asyncio.Queue()
        self._received = self._dropped = 0
        self._is_sending = asyncio.Lock()
        self._asking: asyncio.Task | None = None

    async def run(self, config: SessionConfig) -> None:
        """Serves the session until the client is done or has left, or for `IDLE` seconds without a message."""
        stream = await self._service.engine.call(lambda: self._stream(config))
        await self._send("session.created", mode=stream.stats.mode)
        pushing = asyncio.create_task(self._push(stream))
        try:
            while True:
                received = await asyncio.wait_for(self._socket.receive(), IDLE)
                if received["type"] == "websocket.disconnect":
                    return
                try:
                    if not await self._handle(_json(received), stream, pushing):
                        return
                except ApiError as error:
                    await self._send("error", **error.body())
        finally:
            tasks = [task for task in (pushing, self._asking) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle(self, message: Any, stream: Stream, pushing: asyncio.Task) -> bool:
        """Does what a message says; False after the last one."""
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "video.frame":
            self._keep(parse(VideoFrame, message))
        elif kind == "video.query":
            query = parse(VideoQuery, message)
            check_text(query.text, "text")
            if self._asking and not self._asking.done():
                raise ApiError(409, "the last question is still being answered", "type")
            await self._pushed(pushing)
            self._asking = asyncio.create_task(self._answer(stream, query))
        elif kind == "video.done":
            await self._pushed(pushing)
            if self._asking:
                await self._asking
            await self._send("session.done", **self._stats(stream))
            return False
        else:
            raise ApiError(400, f"type={kind!r} is not known", "type")
        return True

    def _stream(self, config: SessionConfig) -> Stream:
        budget = min(config.budget_tokens, self._service.length - self._service.length // 8)
        budget = 1 << (budget.bit_length() - 1)  # each budget compiles programs
        try:
            return self._service.stream(
                fps=config.fps, budget_tokens=budget, policy=config.policy, recent=config.recent
            )
        except ValueError as error:
            raise ApiError(400, str(error), "session.config") from None

    def _keep(self, frame: VideoFrame) -> None:
        """Queues a frame; the oldest waiting ones make room, since the newest matter most."""
        if frame.time is None:
            seconds = time.monotonic() - self._began
            frame = frame.model_copy(update={"time": seconds})
        self._received += 1
        while self._frames.qsize() >= WAITING:
            self._frames.get_nowait()
            self._frames.task_done()
            self._dropped += 1
        self._frames.put_nowait(frame)

    async def _pushed(self, pushing: asyncio.Task) -> None:
        """Waits until no frame waits.

        Raises:
          ApiError: a frame has failed, and the others cannot be pushed.
        """
        joining = asyncio.ensure_future(self._frames.join())
        await asyncio.wait((joining, pushing), return_when=asyncio.FIRST_COMPLETED)
        joining.cancel()
        if pushing.done():
            raise ApiError.internal()

    async def _push(self, stream: Stream) -> None:
        while True:
            frame = await self._frames.get()
            try:
                image = await self._service.image(
                    from_base64(frame.data, "video.frame.data"), "video.frame"
                )
                push = functools.partial(_push, stream, image, frame.time or 0.0)
                await self._service.engine.call(push)
            except ApiError as error:
                await self._send("error", **error.body())
            except Exception:
                logging.exception("a frame of a live session failed")
                raise
            finally:
                self._frames.task_done()

    async def _answer(self, stream: Stream, query: VideoQuery) -> None:
        began, text, first = time.monotonic(), "", 0.0
        limit = min(query.max_tokens, self._service.limits.new_tokens)
        sampling = Sampling(limit, query.temperature, query.top_p)
        try:
            request = await self._service.engine.call(
                lambda: stream.request(query.text, sampling=sampling, seed=query.seed)
            )
            await self._send("response.start")
            async with contextlib.aclosing(self._service.write(request)) as pieces:
                async for piece in pieces:
                    first = first or time.monotonic() - began
                    text += piece
                    await self._send("response.text.delta", delta=piece)
            await self._send(
                "response.text.done",
                text=text,
                finish_reason=request.finish,
                first_token_seconds=round(first, 4),
                seconds=round(time.monotonic() - began, 4),
                **self._stats(stream),
            )
        except ApiError as error:
            await self._send("error", **error.body())
        except ValueError as error:  # no frames yet, or too long a question
            await self._send("error", **ApiError(400, str(error), "video.query").body())
        except (WebSocketDisconnect, asyncio.CancelledError):
            raise
        except Exception:
            logging.exception("an answer of a live session failed")
            await self._send("error", **ApiError.internal().body())

    def _stats(self, stream: Stream) -> dict[str, Any]:
        found = dataclasses.asdict(stream.stats)
        return {"stats": found | {"received": self._received, "dropped": self._dropped}}

    async def _send(self, kind: str, **fields: Any) -> None:
        async with self._is_sending:
            await self._socket.send_json({"type": kind, **fields})


async def serve(service: Service, socket: WebSocket, api_key: str) -> None:
    """Accepts a connection, and serves its session."""
    if not _is_same_site(socket):
        await socket.close(1008)
        return
    await socket.accept()
    try:
        first = await asyncio.wait_for(socket.receive(), IDLE)
        config = parse(SessionConfig, _json(first))
        check_text(config.api_key, "api_key")
        if not is_key(config.api_key, api_key):
            raise ApiError(401, "the API key is missing or wrong", "api_key")
        with _place(service):
            await LiveSession(service, socket).run(config)
        await socket.close()
    except (WebSocketDisconnect, RuntimeError):
        return  # the client has left
    except (ApiError, TimeoutError) as error:
        if isinstance(error, TimeoutError):
            error = ApiError(400, f"no message for {IDLE:g} s")
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await socket.send_json({"type": "error", **error.body()})
            await socket.close(1008)


@contextlib.contextmanager
def _place(service: Service) -> Iterator[None]:
    """One of the sessions that a service allows."""
    if service.sessions >= service.limits.sessions:
        raise ApiError(429, f"{service.sessions} sessions are open: try again later")
    service.sessions += 1
    try:
        yield
    finally:
        service.sessions -= 1


def _json(received: Mapping[str, Any]) -> Any:
    try:
        return json.loads(received.get("text") or "")
    except (ValueError, RecursionError):
        raise ApiError(400, "a message is not JSON") from None


def parse(kind: type[_Body], message: Any) -> _Body:
    """Checks a message.

    Raises:
      ApiError: it names the field.
    """
    try:
        return kind.model_validate(message)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"])) or "message"
        raise ApiError(400, f"{name}: {first['msg']}", name) from None


def _push(stream: Stream, image: np.ndarray, seconds: float) -> None:
    try:
        stream.push(image, seconds)
    except ValueError as error:  # times that go back
        raise ApiError(400, str(error), "video.frame.time") from None


def _is_same_site(socket: WebSocket) -> bool:
    """Whether the page that connects is ours; other clients than browsers name none."""
    origin = socket.headers.get("origin")
    return origin is None or origin.partition("://")[2] == socket.headers.get("host")
