"""Lets a vLLM server run the decoder: it gets the embeddings of whole prompts, and returns tokens.

    vllm serve EXPORTED/decoder --enable-prompt-embeds

Its completions API takes a tensor in torch's file format, in base64, and with `return_token_ids` streams tokens, so that text,
stop texts and usage are handled here as for our own engine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import pickle
import socket
import struct
import threading
import zipfile
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import ml_dtypes
import numpy as np

from storm_jax.inference.engine import Request
from storm_jax.serve.errors import ApiError
from storm_jax.serve.sockets import shut

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}
_TIMEOUT = 600.0  # seconds without a token


class RemoteDecoder:
    """Answers requests with a server's decoder, as `EngineThread.answer` does.

    Args:
      url: of the server's API, such as http://host:8000/v1.
      model: its name there.
      embed: the embeddings of a request's prompt, [S, D].
      stop_ids: tokens that end an answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        embed: Callable[[Request], Any],
        stop_ids: tuple[int, ...],
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--decoder={url}: use the address of an API, as http://host:8000/v1")
        self._url, self._model = url.rstrip("/"), model
        self._embed, self._stop_ids = embed, stop_ids

    async def answer(self, request: Request) -> AsyncGenerator[list[int]]:
        """Yields the tokens of an answer as they are written; leaving the loop early cancels it.

        Raises:
          ApiError: the server cannot be reached, or refuses the request.
        """
        body = json.dumps(self._body(request, await self._embed(request)))
        reading = _Reading(self._url, body)
        try:
            async for choice in reading.choices():
                request.written += choice["token_ids"]
                request.finish = choice["finish_reason"] or ""
                if choice["token_ids"] or request.finish:
                    yield choice["token_ids"]
            if not request.finish:
                raise ApiError(502, "the decoder's server ended an answer early")
        finally:
            request.finish = request.finish or "cancelled"
            reading.close()

    def _body(self, request: Request, x: np.ndarray) -> dict[str, Any]:
        sampling = request.sampling
        return {
            "model": self._model,
            "prompt_embeds": base64.b64encode(torch_file(x)).decode(),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed % 2**31,
            "stop_token_ids": list(self._stop_ids),
            "stream": True,
            "return_token_ids": True,
        }


class _Reading:
    """One answer of the server, read by a thread.

    Args:
      url: of the API.
      body: of the request.
    """

    def __init__(self, url: str, body: str):
        self._url, self._body = url, body
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[dict[str, Any] | ApiError | None] = asyncio.Queue()
        self._socket: socket.socket | None = None
        self._is_closed = False
        threading.Thread(target=self._read, name="decoder", daemon=True).start()

    async def choices(self) -> AsyncGenerator[dict[str, Any]]:
        """What the server says, a few tokens at a time.

        Raises:
          ApiError: it cannot be reached, or has failed.
        """
        while choice := await self._news.get():
            if isinstance(choice, ApiError):
                raise choice
            yield choice

    def close(self) -> None:
        """Ends the answer; the server notices."""
        self._is_closed = True
        if self._socket is not None:
            shut(self._socket)

    def _read(self) -> None:
        end: ApiError | None = None
        try:
            connection = _connect(self._url)
            connection.connect()
            self._socket = connection.sock
            if self._is_closed:
                return
            for choice in self._events(connection):
                self._tell(choice)
        except ApiError as error:
            end = error
        except Exception as error:  # whatever it sends, the answer ends
            end = ApiError(502, f"the decoder's server failed: {type(error).__name__}")
        self._tell(end)

    def _tell(self, news: dict[str, Any] | ApiError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    def _events(self, connection: http.client.HTTPConnection) -> Iterator[dict[str, Any]]:
        path = urlsplit(self._url).path
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", f"{path}/completions", self._body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ApiError(502, f"the decoder's server answered with {response.status}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ApiError(502, "the decoder's server failed")
            for choice in event["choices"]:
                if choice.get("token_ids") is None:
                    raise ApiError(502, "the decoder's server returns no token ids: use vLLM 0.11")
                yield {"finish_reason": None, **choice}


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=_TIMEOUT)


def torch_file(array: np.ndarray) -> bytes:
    """What `torch.save` writes for a CPU tensor of float32 or bfloat16, without torch."""
    array = np.ascontiguousarray(array)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", _rebuild(array))
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", array.tobytes())
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _rebuild(array: np.ndarray) -> bytes:
    """The pickle of a tensor over storage 0, which names functions of torch that are not imported here."""

    def number(value: int) -> bytes:
        return pickle.BININT + struct.pack("<i", value)

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    def name(module: str, function: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{function}\n".encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = name("torch", _STORAGES[array.dtype])
    parts = [
        pickle.PROTO + bytes([2]),
        name("torch._utils", "_rebuild_tensor_v2"),
        pickle.MARK,
        pickle.MARK + text("storage") + storage + text("0") + text("cpu"),
        number(array.size) + pickle.TUPLE + pickle.BINPERSID,
        number(0) + numbers(array.shape) + numbers(strides) + pickle.NEWFALSE,
        name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
        pickle.TUPLE + pickle.REDUCE + pickle.STOP,
    ]
    return b"".join(parts)
