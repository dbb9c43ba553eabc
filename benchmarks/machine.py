"""Describes the machine that a benchmark ran on."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform

import jax


def machine() -> str:
    device = jax.devices()[0]
    where = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"{os.cpu_count()} CPU cores ({_processor()}){where}, jax {jax.__version__}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
