"""A server in this process, on a free port."""

from __future__ import annotations

import base64
import dataclasses
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import openai
import pytest
import uvicorn

from storm_jax.inference.predictor import Predictor
from storm_jax.serve.app import make_app
from storm_jax.serve.limits import Limits
from storm_jax.serve.service import Service
from storm_jax.serve.sources import Sources

MODEL = "storm"
LIMITS = Limits(
    body_bytes=2**20,
    media=3,
    media_bytes=2**19,
    frames=8,
    seconds=60.0,
    pixels=10**6,
    listed_frames=32,
    new_tokens=24,
    fetch_seconds=5.0,
    queued=4,
)


@dataclasses.dataclass
class Served:
    """A running server.

    Attributes:
      url: of its root.
      service: what it asks.
      predictor: the same model.
    """

    url: str
    service: Service
    predictor: Predictor

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., str]]:
    """Starts an application; returns its address."""
    servers = []

    def start(app) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def predictor(trained_run) -> Predictor:
    return Predictor(trained_run, num_workers=1)


@pytest.fixture(scope="session")
def make_service(predictor) -> Callable[..., Service]:
    def make(limits: Limits = LIMITS, folder: pathlib.Path | None = None, **options) -> Service:
        sources = Sources(limits=limits, folder=folder, domains=options.pop("domains", ()))
        model = options.pop("predictor", predictor)
        sizes = {"rows": 2, "length": 256, "block": 64, "cache_bytes": 2**20} | options
        return Service(model, sources, name=MODEL, **sizes)

    return make


@pytest.fixture(scope="session")
def served(serve, make_service, predictor, shapes_folder) -> Served:
    service = make_service(folder=shapes_folder / "media")
    return Served(serve(make_app(service)), service, predictor)


@pytest.fixture(scope="session")
def clip(shapes_folder) -> pathlib.Path:
    return sorted((shapes_folder / "media/test").glob("*.mp4"))[0]


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def video(content: bytes, **settings) -> dict:
    return {"type": "video_url", "video_url": {"url": data_url(content), **settings}}


def image(content: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(content, "image/png")}}


def ask(text: str, *parts: dict) -> list[dict]:
    """The messages of one question."""
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
