"""Ends connections that another thread reads from."""

from __future__ import annotations

import contextlib
import socket


def shut(connection: socket.socket) -> None:
    """Makes reads end, which closing a socket does not."""
    with contextlib.suppress(OSError):  # it has just ended
        connection.shutdown(socket.SHUT_RDWR)
