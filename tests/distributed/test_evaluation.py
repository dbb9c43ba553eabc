"""Processes that evaluate together share the videos and write one report."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from forked import ROOT

from storm_jax.files import read_lines


@pytest.mark.slow
def test_two_processes_share_an_evaluation(trained_run, shapes_folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "eval.py", f"--workdir={trained_run}", "--benchmark=shapes"]
    command += [f"--data_root={shapes_folder}", "--limit=6", "--batch_size=2"]
    started = [
        subprocess.Popen(
            [
                *command,
                f"--coordinator_address={address}",
                "--num_processes=2",
                f"--process_id={i}",
            ],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        )
        for i in range(2)
    ]
    assert [process.wait(200) for process in started] == [0, 0]
    (folder,) = (trained_run / "evals/shapes").glob("*limit6*")
    assert len(read_lines(folder / "predictions.jsonl")) == 6
    answers = [len(read_lines(path)) for path in sorted(folder.glob("answers.*.jsonl"))]
    assert len(answers) == 2 and sum(answers) == 6 and min(answers) > 0
