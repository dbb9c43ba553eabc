"""The worker pool: results arrive complete, and a hang, crash or error costs one call."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from storm_jax.media import workers
from storm_jax.media.media import Media, MediaError
from storm_jax.media.workers import WorkerCrashError, WorkerPool, WorkerTimeoutError

# Functions that run in the workers, which import this module by name.


def array(size: int, value: int) -> dict:
    return {"a": np.full((size, 3), value, np.uint8), "b": [np.arange(size)], "pid": os.getpid()}


def fill(value: int, out: np.ndarray) -> int:
    out[:] = value
    return os.getpid()


def write_forever(how: str, out: np.ndarray) -> None:
    if how == "killed":
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        out += 1


def hang() -> None:
    time.sleep(3600)


def crash(how: str) -> None:
    if how == "exit":
        os._exit(3)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        ctypes.string_at(0)


def crash_once(marker: str) -> int:
    try:
        pathlib.Path(marker).mkdir()
    except FileExistsError:
        return os.getpid()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fail() -> None:
    raise MediaError(Media(kind="video", name="a.mp4"), "truncated", "too short")


def modules() -> list[str]:
    return list(sys.modules)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as opened:
        yield opened


@pytest.mark.parametrize("size", [0, 1, 5, 200_000, 7])
def test_arrays_are_returned_unchanged_and_stay_valid(pool: WorkerPool, size: int):
    got = pool.call(array, size, 7)
    pool.call(array, size, 9)
    np.testing.assert_array_equal(got["a"], np.full((size, 3), 7))
    np.testing.assert_array_equal(got["b"][0], np.arange(size))
    got["a"][:] = 1


def test_out_is_written_by_the_process_and_nothing_else_is(pool: WorkerPool):
    arrays = pool.memory.empty((4, 10, 3))
    arrays[:] = 0
    assert pool.call(fill, 7, out=arrays[1]) != os.getpid()
    assert (arrays[1] == 7).all() and not arrays[[0, 2, 3]].any()
    with WorkerPool(0) as here:
        assert here.call(fill, 5, out=arrays[2]) == os.getpid()
    assert (arrays[2] == 5).all() and not arrays[[0, 3]].any()


@pytest.mark.parametrize("how", ["hang", "killed"])
def test_a_process_that_failed_while_it_wrote_writes_no_more(pool: WorkerPool, how: str):
    """Its slots are given to the next sample of the row."""
    out = pool.memory.empty((2**22,))
    with pytest.raises((WorkerTimeoutError, WorkerCrashError)):
        pool.call(write_forever, how, limit=0.3, out=out)
    assert out.any()
    out[:] = 0
    pool.call(fill, 3, out=out[:10])
    time.sleep(0.05)
    assert (out[:10] == 3).all() and not out[10:].any()


def test_calls_from_many_threads_do_not_mix():
    with WorkerPool(2) as pool, concurrent.futures.ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda i: pool.call(array, 1000 + i, i % 256), range(60)))
    assert len({result["pid"] for result in results} - {os.getpid()}) == 2
    for i, result in enumerate(results):
        assert result["a"].shape == (1000 + i, 3) and (result["a"] == i % 256).all()


def test_a_process_is_replaced_after_many_calls(monkeypatch):
    monkeypatch.setattr(workers, "CALLS", 3)
    with WorkerPool(1) as pool:
        pids = [pool.call(array, 1, 1)["pid"] for _ in range(7)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


def test_without_processes_calls_run_here():
    assert WorkerPool(0).call(array, 1, 1)["pid"] == os.getpid()


def test_a_hang_costs_one_call(pool: WorkerPool):
    before = pool.call(array, 1, 1)["pid"]
    began = time.monotonic()
    with pytest.raises(WorkerTimeoutError):
        pool.call(hang, limit=0.2)
    assert time.monotonic() - began < 5
    assert pool.call(array, 1, 1, limit=60)["pid"] != before
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


@pytest.mark.parametrize(
    ("how", "message"), [("exit", "status 3"), ("killed", "SIGKILL"), ("segfault", "SIGSEGV")]
)
def test_a_crash_costs_one_call_and_is_described(pool: WorkerPool, how: str, message: str):
    with pytest.raises(WorkerCrashError, match=message):
        pool.call(crash, how)
    assert pool.call(array, 2, 1)["a"].shape == (2, 3)


def test_a_process_killed_from_outside_costs_nothing(pool: WorkerPool, tmp_path):
    assert pool.call(crash_once, str(tmp_path / "killed")) > 0
    assert (tmp_path / "killed").exists()


def test_errors_are_raised_unchanged_and_the_process_survives(pool: WorkerPool):
    before = pool.call(array, 1, 1)["pid"]
    with pytest.raises(MediaError, match=r"video a.mp4 is truncated: too short") as caught:
        pool.call(fail)
    assert caught.value.cause == "truncated"
    assert pool.call(array, 1, 1)["pid"] == before


def test_a_worker_killed_while_it_starts_is_started_again(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\nif mkdir {tmp_path}/once; then kill -9 $$; fi\nexec {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(workers.sys, "executable", str(program))
    with WorkerPool(1) as pool:
        assert pool.call(array, 1, 1)["pid"] > 0


def test_a_worker_that_cannot_start_is_an_error_not_a_bad_sample(monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start: status 1"):
        WorkerPool(1).call(array, 1, 1)


def test_a_closed_pool_refuses_calls():
    with WorkerPool(1) as pool:
        pid = pool.call(array, 1, 1)["pid"]
    with pytest.raises(WorkerCrashError, match="closed"):
        pool.call(array, 1, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_closing_ends_running_calls():
    pool = WorkerPool(3)
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(pool.call, hang) for _ in range(6)]
        while sum(worker._process is not None for worker in pool._workers) < 3:
            time.sleep(0.01)
        began = time.monotonic()
        pool.close()
        for call in calls:
            with pytest.raises(WorkerCrashError):
                call.result()
    assert time.monotonic() - began < 5


def test_workers_that_decode_do_not_import_jax(pool: WorkerPool):
    from storm_jax.media.read import read_media

    with WorkerPool(1) as fresh:
        with pytest.raises(MediaError):
            fresh.call(read_media, Media.file("video", "missing.mp4"), 1, 8, 0.0)
        names = fresh.call(modules)
    # This module imports pytest, but not JAX.
    assert "av" in names and not {"jax", "grain", "transformers"} & set(names)


PARENT = """
import os, sys, time
from storm_jax.media.workers import WorkerPool
import test_workers
pool = WorkerPool(1)
print(pool.call(test_workers.array, 1, 1)["pid"], flush=True)
pool.call(test_workers.hang)
"""


def test_a_hanging_worker_does_not_outlive_a_killed_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path]),
        },
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker outlives its parent")
