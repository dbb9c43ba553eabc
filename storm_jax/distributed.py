"""Several processes that work on one run: what they tell each other, and that all of them are alive.

Processes talk through the key-value store of JAX's coordination service, which process 0 hosts. No device
takes part, so a message never waits for one. Everything here is immediate with one process.

A process that fails says why, and the others end with that line. Each process reports every second that it
is alive. One that is silent for 40 seconds has died or hangs, and the others end with a line that names it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed as _jax_distributed  # its client has no public name
from jax.experimental import multihost_utils

from storm_jax.files import system_error

BEAT = 1.0  # seconds between two reports of a process
SILENCE = 40.0  # seconds without a report after which a process has died or hangs
_SHORT_SILENCE = 8.0  # the same, once a computation with the other processes has failed
_PATIENCE = 10.0  # seconds that process 0 stays to pass a failure on
_DAY = 24 * 3600 * 1000  # milliseconds; the watch ends a wait for a process that died
# JAX ends a job after half to all of these seconds of silence: later than the watch.
_HEARTBEAT = 120
_KEPT = 8  # barriers whose messages are kept
_SHUTDOWN = 60  # seconds that the processes may leave apart


class ProcessError(RuntimeError):
    """Processes that cannot start together or do not see the same files."""


def is_main() -> bool:
    """Whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    names = gather(name)
    assert set(names) == {name}, f"processes are at different places: {names}"


def broadcast(value: Any) -> Any:
    """Returns the value (plain JSON) of process 0."""
    return gather(value if is_main() else None)[0]


def gather(value: Any) -> list[Any]:
    """Returns the values (plain JSON) of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    global _rounds
    _rounds += 1
    client, folder = _client(), f"storm/gather/{_rounds}"
    if not is_main():
        client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
        return json.loads(client.blocking_key_value_get(f"{folder}/all", _DAY))
    others = range(1, jax.process_count())
    found = [client.blocking_key_value_get(f"{folder}/{number}", _DAY) for number in others]
    text = f"[{', '.join([json.dumps(value), *found])}]"
    client.key_value_set(f"{folder}/all", text)
    client.key_value_delete(f"storm/gather/{_rounds - 1}")  # all have read it, or would not be here
    return json.loads(text)


_rounds = 0


def _client() -> Any:
    """JAX's connection to the coordination service."""
    return _jax_distributed.global_state.client


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Prints and warnings of the block are dropped: those of process 0 are enough."""
    level = logging.getLogger().level
    with pathlib.Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        logging.getLogger().setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger().setLevel(level)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Process 0 runs the block before the others, which find what it wrote."""
    if not is_main():
        barrier(name)
    yield
    if is_main():
        barrier(name)


def agree_on_step(name: str, wanted: bool, step: int) -> bool:
    """Whether all processes do something after this step because one of them wants it.

    Every process calls this after every step. Process 0 chooses two steps ahead, before it takes part in the
    next one, so that no process can be past the choice when it is published.
    """
    if jax.process_count() == 1:
        return wanted
    client, folder = _client(), f"storm/{name}"
    if wanted:
        client.key_value_set(f"{folder}/wanted", "", allow_overwrite=True)
    found = dict(client.key_value_dir_get(f"{folder}/"))
    if is_main() and found and f"{folder}/step" not in found:
        found[f"{folder}/step"] = str(step + 2)
        client.key_value_set(f"{folder}/step", found[f"{folder}/step"])
    return found.get(f"{folder}/step") == str(step)


class Vote:
    """Barriers that any process can break: those that wait there, and all later ones, then raise.

    Every process makes its votes in the same order.
    """

    def __init__(self, name: str):
        self.name = f"{name}_{next(_votes)}"
        self._uses: Counter[str] = Counter()
        self._folders: list[str] = []

    def fail(self, reason: str) -> None:
        if jax.process_count() > 1:
            key = f"storm/{self.name}/failed/{jax.process_index()}"
            _client().key_value_set(key, reason, allow_overwrite=True)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes are at this key, which may be used again; from any thread.

        A thread that comes here while it handles an error breaks the barriers: Orbax waits for the others even
        if it could not write.

        Raises:
          OSError: if a process failed, or one is not here in time.
        """
        if jax.process_count() == 1:
            return
        if (error := sys.exception()) is not None:
            self.fail(system_error(error) or str(error).split("\n", maxsplit=1)[0])
        self._uses[key] += 1
        folder = f"storm/{self.name}/{key}/{self._uses[key]}"
        deadline = time.monotonic() + timeout_ms / 1000
        _client().key_value_set(f"{folder}/{jax.process_index()}", "")
        self._folders.append(folder)
        if is_main() and len(self._folders) > _KEPT:  # all have left that barrier long ago
            _client().key_value_delete(self._folders.pop(0))
        while len(_client().key_value_dir_get(f"{folder}/")) < jax.process_count():
            if failed := _client().key_value_dir_get(f"storm/{self.name}/failed/"):
                raise OSError(errno.EIO, failed[0][1])
            if time.monotonic() > deadline:
                late = f"not all processes reached {key} in {timeout_ms / 1000:.0f} s"
                raise OSError(errno.ETIMEDOUT, late)
            time.sleep(BEAT / 10)


_votes = itertools.count()


@contextlib.contextmanager
def processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Joins the other processes for the duration of the block, and leaves together with them.

    Without arguments, JAX finds them in the environment of Slurm, Open MPI, Kubernetes or a TPU pod; without
    such an environment this is the only process. If one process raises, the others end with its message.

    Raises:
      ProcessError: if the processes do not find each other.
    """
    arguments = (coordinator_address, num_processes, process_id)
    if arguments == (None, None, None) and not _is_launched():
        yield
        return
    _initialize(*arguments)
    if jax.process_count() == 1:
        yield
        return
    names = gather(socket.gethostname())
    # CPUs connect at their first exchange, and wait 30 s for each other: a compilation may take longer.
    multihost_utils.sync_global_devices("start")
    watch = _Watch([f"process {number} on {host}" for number, host in enumerate(names)])
    try:
        yield
        barrier("end")
    except BaseException as error:
        watch.fail(error)
        raise
    watch.close()
    jax.distributed.shutdown()


def _initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    # SIGTERM is ours: the training saves.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator_address else None,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except Exception as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ProcessError(
            f"the processes did not find each other ({reason}): pass --coordinator_address=HOST:PORT of "
            f"process 0, --num_processes and --process_id to each process, or start them with a launcher "
            f"that JAX detects (docs/scaling.md)"
        ) from error


def _is_launched() -> bool:
    """Whether a launcher that JAX detects started this process as one of several.

    JAX would take a shell in a Slurm allocation for one of several processes, and wait for the others.
    """
    environment = os.environ.get
    return (
        int(environment("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(environment("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "JAX_COORDINATOR_ADDRESS" in os.environ
        or ("JOB_COMPLETION_INDEX" in os.environ and _has("kubernetes"))
        or (_has("libtpu") and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0"))))
    )


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class _Watch:
    """Reports that this process is alive, and ends it when another one failed, died or hangs.

    Args:
      names: of the processes, for messages.
    """

    def __init__(self, names: list[str]):
        global _watch
        _watch = self
        self._names, self._index = names, jax.process_index()
        self._client = _client()
        self._lock = threading.RLock()  # held by who ends the process
        self._closed = threading.Event()
        self._answered = time.monotonic()  # when process 0 last answered
        self._reports: dict[int, str] = {}
        self._heard = dict.fromkeys(range(len(names)), time.monotonic())
        self._phase, self._phase_began, self._limit = "", time.monotonic(), 0.0
        self._catch_abort()
        for loop in (self._report, self._check):
            threading.Thread(target=loop, name=f"storm-watch-{loop.__name__}", daemon=True).start()

    def enter(self, phase: str, limit: float) -> None:
        """Notes what the main thread does and how long it may take; 0 = any time."""
        self._phase, self._phase_began, self._limit = phase, time.monotonic(), limit

    def close(self) -> None:
        self._closed.set()
        _signal_in_c(signal.SIGABRT, None)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends, unless the reason is that another one has ended.

        Python then exits without waiting for the others.
        """
        from_outside = isinstance(error, jax.errors.JaxRuntimeError)
        if from_outside and "RESOURCE_EXHAUSTED" not in str(error):  # perhaps another one has gone
            deadline = time.monotonic() + _SHORT_SILENCE + 3 * BEAT
            while time.monotonic() < deadline:
                self._end_for_silence(_SHORT_SILENCE)
                time.sleep(BEAT / 4)
        with self._lock:
            message = (str(error) or type(error).__name__).split("\n", maxsplit=1)[0]
            self._publish(message)
            code = error.code if isinstance(error, SystemExit) else 1
            atexit.register(_exit_at_once, code if isinstance(code, int) else 1)
            self._closed.set()
            self._see_off()

    def _report(self) -> None:
        """Publishes a report every second, and reads those of the others."""
        number = 0
        while not self._closed.wait(BEAT):
            number += 1
            report = json.dumps([number, self._phase])
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 does not answer
                self._client.key_value_set(
                    f"storm/alive/{self._index}", report, allow_overwrite=True
                )
                reports = self._client.key_value_dir_get("storm/alive/")
                failures = self._client.key_value_dir_get("storm/failed/")
                now = self._answered = time.monotonic()
                for key, text in reports:
                    process = int(key.rpartition("/")[2])
                    if text != self._reports.get(process):
                        self._reports[process], self._heard[process] = text, now
                for key, message in failures:
                    process = int(key.rpartition("/")[2])
                    if process != self._index:
                        self._end(f"{self._names[process]}: {message}")

    def _check(self) -> None:
        while not self._closed.wait(BEAT):
            self._end_for_silence(SILENCE)
            self._end_if_stuck()

    def _end_for_silence(self, limit: float) -> None:
        now = time.monotonic()
        if now - self._answered > limit:
            self._end(
                f"{self._names[0]}, which coordinates the others, has not answered for {limit:.0f} s",
                sees_off=False,
            )
        for process, heard in self._heard.items():
            if process != self._index and self._answered - heard > limit:
                self._end(
                    f"{self._names[process]} has died or hangs: it has been silent for {limit:.0f} s"
                )

    def _end_if_stuck(self) -> None:
        phase, seconds = self._phase, time.monotonic() - self._phase_began
        if not self._limit or seconds < self._limit:
            return
        others = [json.loads(text)[1] for key, text in self._reports.items() if key != self._index]
        if any(other != phase for other in others):  # they wait for this one
            message = f"{phase} has taken {seconds:.0f} s, and the other processes wait"
            self._publish(message)
            self._end(f"{self._names[self._index]}: {message}")

    def _publish(self, message: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"storm/failed/{self._index}", message, allow_overwrite=True)

    def _see_off(self) -> None:
        """Process 0 hosts the messages: it stays until the others have read the last one, or for 10 s."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"storm/ended/{self._index}", "", allow_overwrite=True)
            deadline = time.monotonic() + _PATIENCE
            while self._index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get("storm/ended/")) == len(self._names):
                    break
                time.sleep(BEAT / 4)

    def _end(self, message: str, sees_off: bool = True) -> None:
        """Ends this process at once, with one line; its main thread may be waiting for the others."""
        with self._lock:
            if self._closed.is_set():
                return
            if sees_off:
                self._see_off()
            self._say(message)
            _exit_at_once(1)

    def _say(self, message: str) -> None:
        program = pathlib.Path(sys.argv[0]).name
        line = f"{program}: {message}. The same command resumes once all processes can run\n"
        os.write(2, line.encode())

    def _catch_abort(self) -> None:
        """JAX aborts the process as soon as process 0 has gone. The last line is then ours."""
        host, _, port = str(_jax_distributed.global_state.coordinator_address).rpartition(":")

        def on_abort(_: int) -> None:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            except OSError:
                self._say(f"{self._names[0]}, which coordinates the others, has died")
                _exit_at_once(1)

        _signal_in_c(signal.SIGABRT, on_abort)


_watch: _Watch | None = None


def enter(phase: str, limit: float = 0.0) -> None:
    """Notes what this process does next.

    Args:
      limit: seconds after which it is stuck if the other processes are waiting for it; 0 = never.
    """
    if _watch is not None:
        _watch.enter(phase, limit)


def _signal_in_c(number: int, handler: Any) -> None:
    """Sets a handler that runs in the thread of the signal: Python's would run too late for SIGABRT."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler) if handler else None
    _callbacks[number] = callback  # not collected while it may be called
    libc.signal(number, ctypes.cast(callback, ctypes.c_void_p) if callback else signal.SIG_DFL)


_callbacks: dict[int, Any] = {}


def _exit_at_once(code: int) -> None:
    """Exits without JAX's farewell, which waits for processes that have gone."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
