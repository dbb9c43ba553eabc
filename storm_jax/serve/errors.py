"""Errors that a client gets, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "BadRequestError",
    415: "BadRequestError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is refused or has failed.

    Args:
      status: HTTP status.
      param: the field of the request that is wrong.
      retry_after: seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int = 0):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.retry_after = retry_after

    @classmethod
    def internal(cls) -> ApiError:
        """A fault of ours, which is logged where it is noticed."""
        return cls(500, "the server failed; its log says why")

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "InternalServerError")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.status,
            }
        }

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)} if self.retry_after else {}
