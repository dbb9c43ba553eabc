"""What a result depends on: code, libraries, devices, configuration."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from storm_jax import config as config_lib
from storm_jax.config import RunConfig
from storm_jax.files import digest

_LIBRARIES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "av", "pillow", "numpy")


def config_hash(config: RunConfig) -> str:
    """A digest of everything but the mesh and the number of workers, which depend on the machine."""
    fields = config_lib.to_dict(config)
    fields.pop("mesh")
    fields["data"].pop("num_workers")
    return digest(json.dumps(fields, sort_keys=True))


def about_this_machine() -> Mapping[str, Any]:
    """Commit, versions and devices."""
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _commit() -> str:
    """The commit of this code, "-dirty" if there are changes; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
