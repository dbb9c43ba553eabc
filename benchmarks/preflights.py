"""Calls `storm_jax.preflight` for the benchmarks that print what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def preflight(config: str, topology: str, *flags: str) -> dict[str, Any]:
    """What `storm_jax.preflight --json` prints about the training step; ends the program if it fails."""
    command = [
        sys.executable, "-m", "storm_jax.preflight", f"--config={config}", f"--topology={topology}",
        "--programs=train", "--json", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        sys.exit(done.returncode)
    return json.loads(done.stdout)
