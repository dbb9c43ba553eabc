"""Tolerances for comparing the scans with float64 references."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


def assert_close(got, expected):
    """Compares trees. Errors are relative to the largest value of an array if that exceeds one, because
    the terms of long sums cancel."""

    def compare(path, got, expected):
        scale = max(1.0, np.abs(expected).max())
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got / scale, expected / scale, **TOLERANCE, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, got, expected)
