"""Starts train.py as several processes on this machine."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from storm_jax.config import RunConfig, to_dict
from storm_jax.files import read_lines
from tests.forked import ROOT

LIMIT = 600.0  # seconds without progress


def write_config(config: RunConfig, path: pathlib.Path) -> pathlib.Path:
    """A file for --config that returns `config`."""
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({json.dumps(to_dict(config))!r}))\n"
    )
    return path


class Launch:
    """The processes of one training. Their output is appended to WORKDIR.0.log, WORKDIR.1.log and so on.

    Args:
      arguments: of train.py.
      devices: fake devices of each process.
    """

    def __init__(
        self, workdir: pathlib.Path, arguments: list[str], *, processes: int = 1, devices: int = 1
    ):
        self.workdir = workdir
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        }
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.processes = []
        for number in range(processes):
            flags = [f"--workdir={workdir}", *arguments]
            if processes > 1:
                flags += [f"--coordinator_address={address}", f"--num_processes={processes}"]
                flags += [f"--process_id={number}"]
            with self._log(number).open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "train.py", *flags],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                )

    def _log(self, number: int) -> pathlib.Path:
        return self.workdir.with_name(f"{self.workdir.name}.{number}.log")

    def wait_for(self, step: int) -> bool:
        """Waits until a step is logged. False if a process ended first."""
        deadline = time.monotonic() + LIMIT
        while last_step(self.workdir) < step:
            if any(process.poll() is not None for process in self.processes):
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"no step in {LIMIT:.0f} s: see {self.workdir}.*.log")
            time.sleep(0.02)
        return True

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Waits until all processes have ended; returns their statuses."""
        deadline = time.monotonic() + limit
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def last_line(self, number: int) -> str:
        """The last line that a process printed."""
        return self._log(number).read_text().rstrip().rpartition("\n")[2]


def metrics(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """Metrics by step, without times."""
    path = workdir / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return {
        line["step"]: {k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines
    }


def last_step(workdir: pathlib.Path) -> int:
    return max(metrics(workdir), default=0)
