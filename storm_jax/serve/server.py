"""Runs the application with uvicorn."""

from __future__ import annotations

import signal
import socket

import uvicorn

from storm_jax.serve.app import make_app
from storm_jax.serve.service import Service

_DRAIN = 60  # seconds for open requests after SIGTERM


def listen(host: str, port: int) -> socket.socket:
    """Takes an address; port 0 is a free one.

    Raises:
      ValueError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def run(service: Service, listening: socket.socket, api_key: str = "") -> None:
    """Serves until SIGTERM or Ctrl-C; then open requests are finished."""
    address, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        make_app(service, api_key),
        log_level="warning",
        timeout_graceful_shutdown=_DRAIN,
        server_header=False,
    )
    print(f"serving {service.name} on http://{address}:{port}", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again at its end
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])
