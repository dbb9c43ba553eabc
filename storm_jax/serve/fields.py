"""Checks of the fields that clients send."""

from __future__ import annotations

import base64
import binascii

from pydantic import BaseModel, ConfigDict

from storm_jax.serve.errors import ApiError


class Strict(BaseModel):
    """A message without fields that we do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_text(text: str, field: str) -> None:
    """Raises ApiError if a text has code points that no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{field} is not valid Unicode", field) from None


def from_base64(text: str, field: str) -> bytes:
    """The bytes of a field.

    Raises:
      ApiError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{field} is not base64: {error}", field) from None
