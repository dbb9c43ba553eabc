"""How close the scans have to be to their float64 references."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

# Of the largest value, where that is above one: sums over many steps cancel.
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


def assert_close(got, expected):
    """Equal trees, by the largest value of each array: sums over many steps cancel."""

    def compare(path, got, expected):
        scale = max(1.0, np.abs(expected).max())
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got / scale, expected / scale, **TOLERANCE, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, got, expected)
