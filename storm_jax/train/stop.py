"""SIGTERM asks a training to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from storm_jax import distributed

STOPPED = 75  # exit status EX_TEMPFAIL: stopped on request, the same command resumes


class StopRequest:
    """Whether any process of this training was asked to stop."""

    def __init__(self) -> None:
        self._received = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is a request in this context."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python allows no handlers here
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def is_due(self, step: int) -> bool:
        """Whether all processes stop after this step. Every process asks after every step."""
        return distributed.agree_on_step("stop", self._received, step)
