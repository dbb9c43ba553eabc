"""What /metrics shows, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server.

    Attributes:
      requests: by status.
      first_token, between_tokens, whole: seconds of answers; from the arrival of a request.
      prepare: seconds to read, decode and encode its media.
      tokens: by kind: "prompt", "visual" and "generated".
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict = {"registry": self._registry}
        self.requests = Counter("storm_requests", "Requests by status.", ["status"], **options)
        self.tokens = Counter("storm_tokens", "Tokens by kind.", ["kind"], **options)
        self.first_token = self._seconds("first_token", "From a request to its first token.")
        self.between_tokens = self._seconds("between_tokens", "From one piece of text to the next.")
        self.whole = self._seconds("request", "From a request to the end of its answer.")
        self.prepare = self._seconds("prepare", "To read, decode and encode the media.")

    def watch(self, name: str, text: str, function: Callable[[], float]) -> None:
        """Adds a gauge whose value is that of a function."""
        Gauge(f"storm_{name}", text, registry=self._registry).set_function(function)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"storm_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)
