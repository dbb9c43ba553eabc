"""Comparison of API keys."""

from __future__ import annotations

import hmac


def is_key(given: str, key: str) -> bool:
    """Whether a client's key is right; without a key, everything is. The time does not depend on the place of a difference."""
    return not key or hmac.compare_digest(given.encode(), key.encode())
