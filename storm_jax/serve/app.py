"""The HTTP interface.

GET  /                           the page
POST /v1/chat/completions        answers, whole or as server-sent events
WS   /v1/video/chat/stream       a video that arrives, and questions about it
GET  /v1/models, /health, /metrics
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import mimetypes
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from absl import logging
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from storm_jax.serve import live
from storm_jax.serve.chat import ChatRequest, parse
from storm_jax.serve.errors import ApiError
from storm_jax.serve.keys import is_key
from storm_jax.serve.metrics import Metrics
from storm_jax.serve.service import Prepared, Service

_Result = TypeVar("_Result")

_RETRY_AFTER = 1  # seconds
_BODY_SECONDS = 60
_PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_OPEN = ("/health", *_PAGE)  # without an API key
# The page loads nothing but its own files, and shows media that the user has chosen.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(service: Service, api_key: str = "") -> FastAPI:
    """The application; uvicorn runs it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics()
    desk = _Desk(service, metrics)
    _watch(service, metrics, desk)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        return await desk.chat(http)

    @app.websocket("/v1/video/chat/stream")
    async def stream(socket: WebSocket) -> None:
        await live.serve(service, socket, api_key)

    @app.get("/v1/models")
    async def models() -> Any:
        model = {
            "id": service.name,
            "object": "model",
            "created": started,
            "owned_by": "storm",
            "root": service.name,
            "max_model_len": service.length,
            "storm": service.settings(),
        }
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if service.engine.is_alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    for path, name in _PAGE.items():
        app.get(path)(_page_file(name))
    _answer_errors(app)
    if api_key:
        app.add_middleware(_NeedsKey, key=api_key)
    return app


def _page_file(name: str) -> Callable[[], Response]:
    file = importlib.resources.files("storm_jax.serve") / "page" / name
    content, kind = file.read_bytes(), mimetypes.guess_type(name)[0]

    def show() -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return show


def _watch(service: Service, metrics: Metrics, desk: _Desk) -> None:
    engine, tables = service.engine, service.tables
    metrics.watch("running", "Answers that are being written.", lambda: engine.running)
    metrics.watch("waiting", "Requests that wait for a row.", lambda: engine.waiting)
    metrics.watch("open_requests", "Requests that are not finished.", lambda: desk.open)
    metrics.watch("programs", "Programs that were compiled.", lambda: service.num_programs)
    metrics.watch("table_bytes", "Encoded media that are kept.", lambda: tables.nbytes)
    metrics.watch("table_hits", "Media that were found encoded.", lambda: tables.hits)
    metrics.watch("table_misses", "Media that were encoded.", lambda: tables.misses)


def _answer_errors(app: FastAPI) -> None:
    """Gives all errors the form of OpenAI's API."""

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(404)
    async def unknown(http: Request, _: Exception) -> JSONResponse:
        return await refuse(http, ApiError(404, f"there is no {http.scope['path']}"))

    @app.exception_handler(405)
    async def wrong_method(http: Request, _: Exception) -> JSONResponse:
        return await refuse(http, ApiError(405, f"{http.scope['path']} takes no {http.method}"))

    @app.exception_handler(Exception)
    async def fail(http: Request, _: Exception) -> JSONResponse:
        return await refuse(http, ApiError.internal())


class _NeedsKey:
    """Refuses HTTP requests without the API key; live sessions check it themselves."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        if is_key(given.removeprefix("Bearer "), self._key):
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "the API key is missing or wrong")
        await JSONResponse(error.body(), error.status)(scope, receive, send)


class _Desk:
    """Handles chat requests.

    Attributes:
      open: requests that are not finished.
    """

    def __init__(self, service: Service, metrics: Metrics):
        self._service, self._metrics = service, metrics
        self.open = 0

    async def chat(self, http: Request) -> Response:
        visit = _Visit(self, self._metrics)
        try:
            self._check_queue()
            return await self._answer(http, visit)
        except ApiError as error:
            visit.end(error.status)
            raise
        except BaseException:
            visit.end(500)
            raise

    def _check_queue(self) -> None:
        limit = self._service.limits.queued + self._service.rows
        if max(self.open, self._service.tables.making) > limit:
            message = f"{self.open - 1} requests are open: try again"
            raise ApiError(429, message, retry_after=_RETRY_AFTER)

    async def _answer(self, http: Request, visit: _Visit) -> Response:
        """Prepares a request, and answers it; a stream is answered while it is sent."""
        body = await _body(http, self._service.limits.body_bytes)
        chat = parse(body)
        prepared = await _unless_gone(http.receive, self._service.prepare(chat))
        visit.prepared(prepared)
        reply = _Reply(chat, prepared)
        pieces = visit.timed(self._service.answer(prepared))
        if chat.stream:
            return _Events(reply.events(pieces), visit)
        text = await _unless_gone(http.receive, _joined(pieces))
        visit.end(200)
        return JSONResponse(reply.whole(text))


class _Visit:
    """One request, from its arrival to its end."""

    def __init__(self, desk: _Desk, metrics: Metrics):
        self._desk, self._metrics = desk, metrics
        self._began = time.monotonic()
        self._prepared: Prepared | None = None
        self._is_open = True
        desk.open += 1

    def prepared(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._metrics.prepare.observe(time.monotonic() - self._began)
        self._metrics.tokens.labels("prompt").inc(len(prepared.request.tokens))
        self._metrics.tokens.labels("visual").inc(prepared.seen.scene.visual_tokens)

    async def timed(self, pieces: AsyncGenerator[str]) -> AsyncGenerator[str]:
        """The pieces of an answer; records when they come."""
        last = 0.0
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                now = time.monotonic()
                if last:
                    self._metrics.between_tokens.observe(now - last)
                else:
                    self._metrics.first_token.observe(now - self._began)
                last = now
                yield piece

    def end(self, status: int) -> None:
        """Counts the request, the first time this is called."""
        if not self._is_open:
            return
        self._is_open = False
        self._desk.open -= 1
        self._metrics.requests.labels(status).inc()
        if self._prepared is not None:
            self._metrics.tokens.labels("generated").inc(len(self._prepared.request.written))
        if status == 200:
            self._metrics.whole.observe(time.monotonic() - self._began)


class _Events(Response):
    """Server-sent events, until they end or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], visit: _Visit):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._visit = events, visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for event in self._events:
                body = {"type": "http.response.body", "body": event.encode(), "more_body": True}
                await send(body)
            await send({"type": "http.response.body", "body": b""})

        status = 499  # the client has left
        try:
            with contextlib.suppress(ApiError):
                await _unless_gone(receive, stream())
                status = 200
        finally:
            await self._events.aclose()
            self._visit.end(status)


class _Reply:
    """The answer to one request, in OpenAI's form."""

    def __init__(self, chat: ChatRequest, prepared: Prepared):
        self._chat, self._prepared = chat, prepared
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, text: str) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": self._prepared.finish,
            "logprobs": None,
        }
        return self._object("chat.completion", [choice]) | {
            "usage": self._prepared.usage(),
            "storm": self._prepared.seen_media(),
        }

    async def events(self, pieces: AsyncGenerator[str]) -> AsyncGenerator[str]:
        """Server-sent events."""
        try:
            async with contextlib.aclosing(pieces):
                first = self._chunk({"role": "assistant", "content": ""})
                yield _event(first | {"storm": self._prepared.seen_media()})
                async for piece in pieces:
                    yield _event(self._chunk({"content": piece}))
            yield _event(self._chunk({}, self._prepared.finish))
            if self._chat.stream_options.include_usage:
                usage = {"usage": self._prepared.usage()}
                yield _event(self._object("chat.completion.chunk", []) | usage)
        except ApiError as error:
            yield _event(error.body())
        except Exception:
            logging.exception("an answer failed")
            yield _event(ApiError.internal().body())
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._chat.model,
            "choices": choices,
        }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _body(http: Request, limit: int) -> Any:
    """The JSON of a request, of which no more than `limit` bytes are read."""
    # Other types can be sent by any web page without asking.
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the Content-Type is {kind or 'missing'}: use application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in http.stream():
                content += chunk
                if len(content) > limit:
                    raise ApiError(413, f"the request is larger than {limit:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive in {_BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client has left") from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


async def _joined(pieces: AsyncGenerator[str]) -> str:
    async with contextlib.aclosing(pieces):
        return "".join([piece async for piece in pieces])


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled if the client leaves before.

    Raises:
      ApiError: the client has left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has left")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
