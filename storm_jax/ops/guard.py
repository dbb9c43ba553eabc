"""Checks a kernel against its reference on the device, before it is first used there."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def agrees(
    name: str,
    kernel: Callable[[], Any],
    reference: Callable[[], Any],
    tolerance: float,
    instead: str,
) -> bool:
    """Whether a kernel runs and returns the arrays of its reference; if not, a warning says why.

    May be called while another program is traced.

    Args:
      kernel, reference: compute equal trees of arrays.
      tolerance: largest difference, relative to the largest value of each array of the reference.
      instead: the implementation that is used instead, for the warning.
    """
    device = jax.local_devices()[0].device_kind
    try:
        found, expected = _computed(kernel), _computed(reference)
    except Exception as error:  # a compiler or driver raises anything
        reason = str(error).split("\n")[0] or type(error).__name__
        logging.warning("%s fails on %s (%s): using %r", name, device, reason, instead)
        return False
    for (path, value), (_, right) in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected), strict=True
    ):
        scale = max(float(np.abs(right).max()), 1e-30)
        worst = np.unravel_index(np.argmax(np.abs(value - right)), right.shape)
        if not float(np.abs(value - right).max()) <= tolerance * scale:  # NaN is no agreement
            logging.warning(
                "%s is wrong on %s: output%s has %g, the reference %g: using %r",
                name,
                device,
                jax.tree_util.keystr(path),
                value[worst],
                right[worst],
                instead,
            )
            return False
    return True


def _computed(function: Callable[[], Any]) -> Any:
    """The arrays of a function in float64. A thread of its own has no trace or mesh around it."""

    def run() -> Any:
        with (
            jax.default_device(jax.local_devices()[0]),
            jax.default_matmul_precision("highest"),
        ):
            return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), function())

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()
