"""What processes tell each other, and that all end when one fails, dies or hangs."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap

import pytest
from forked import ROOT

from storm_jax import distributed

HOST = socket.gethostname()


def run_processes(code: str, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Runs `code` inside `distributed.processes` in several processes; `me` is the number of each."""
    script = (
        "import sys, time, jax\nfrom storm_jax import distributed as d\nme = int(sys.argv[1])\n"
        "with d.processes(sys.argv[2], int(sys.argv[3]), me):\n" + textwrap.indent(code, "    ")
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number), address, str(count)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(count)
    ]
    results = []
    for process in started:
        out, err = process.communicate(timeout=60)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def test_messages_and_votes():
    code = """
assert d.gather({"from": me}) == [{"from": 0}, {"from": 1}, {"from": 2}]
assert d.broadcast(f"value of {me}") == "value of 0"
with d.main_first("order"):
    time.sleep(0 if me else 0.5)
    first = time.time()
times = d.gather(first)
assert times[0] < min(times[1:]), times
stops = [step for step in range(6) if d.agree_on_step("stop", me == 2 and step >= 1, step) or d.barrier("step")]
assert len(stops) == 1 and d.gather(stops) == [stops] * 3, stops
vote = d.Vote("save")
for _ in range(20):
    vote.barrier(key="all", timeout_ms=10_000)
try:
    vote.fail("the disk is full") if me == 1 else vote.barrier(key="some", timeout_ms=30_000)
except OSError as error:
    assert error.strerror == "the disk is full"
else:
    assert me == 1
print("done")
"""
    for done in run_processes(code, count=3):
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "done"), done.stderr


def test_the_others_end_with_the_message_of_one_that_fails():
    code = 'if me == 0: raise RuntimeError("no tokenizer here")\nd.barrier("never")'
    failed, other = run_processes(code)
    assert failed.returncode == 1 and "RuntimeError: no tokenizer here" in failed.stderr
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].startswith(f"-c: process 0 on {HOST}: no tokenizer here.")


def test_a_process_that_is_stuck_while_others_wait_is_named():
    code = """
d.enter("reading the batch of step 3", 2.0)
if me == 1:
    time.sleep(60)
d.enter("step 3")
d.barrier("step 3")
"""
    for done in run_processes(code):
        assert done.returncode == 1
        message = f"-c: process 1 on {HOST}: reading the batch of step 3 has taken"
        assert done.stderr.splitlines()[-1].startswith(message)


def test_processes_that_do_not_find_each_other_are_one_error():
    with (
        pytest.raises(distributed.ProcessError, match="--coordinator_address=HOST:PORT"),
        distributed.processes("localhost:1", 2, 5),
    ):
        pass


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        # A shell in an allocation, with and without a step of its own.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_only_a_launcher_of_several_processes_is_joined(environment, expected, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._is_launched() == expected
