"""Describes the machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform

import jax


def machine() -> str:
    device = jax.devices()[0]
    where = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"{platform.machine()}, {os.cpu_count()} CPU cores{where}, jax {jax.__version__}"
