"""A pool of worker processes with a time limit per call, so that a hang or a crash costs one call.

Workers are separate programs: forking is unsafe because JAX starts threads, and multiprocessing's spawned
children would import the main script, and JAX with it. Calls and results go through a socket, except for
frames, which workers write to memory that is shared with them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from storm_jax.media.shared_memory import MappedMemory, SharedMemory

START_LIMIT = 120.0  # seconds
# A worker is replaced after this many calls: decoders leak 1 to 2 kB per file.
CALLS = 4000
_PATIENCE = 10.0  # seconds
# For glibc: keep freed memory for the next file. By default it returns buffers as large as a frame to the
# kernel, which has to clear their pages again.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}


class WorkerTimeoutError(TimeoutError):
    """A call exceeded its time limit; its process was killed."""


class WorkerCrashError(RuntimeError):
    """The processes that ran a call died."""


class WorkerPool:
    """A pool of `count` processes. With 0, calls run in the calling thread without a time limit.

    `call` is thread-safe; each caller waits for a free process.

    Attributes:
      memory: allocates the arrays that processes can write to.
    """

    def __init__(self, count: int):
        self.count = count
        self.memory = SharedMemory()
        self._closed = False
        self._workers = [_Worker(self.memory) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def call(
        self,
        function: Callable,
        *args: Any,
        limit: float | None = None,
        out: np.ndarray | None = None,
    ) -> Any:
        """Returns `function(*args)`, or `function(*args, out=out)`, evaluated in a worker process.

        The function must be importable by name, and its arguments and result picklable. Its exceptions
        are raised here.

        Args:
          limit: time limit in seconds; None disables it.
          out: array of `memory`, or a contiguous view of one, that the function gets as the keyword `out`
            and may write to. If the call raises, its contents are arbitrary.

        Raises:
          WorkerTimeoutError: the call took longer than `limit`.
          WorkerCrashError: two processes died of the call. One may have been killed from outside.
        """
        if not self.count:
            return function(*args) if out is None else function(*args, out=out)
        try:
            return self._call(function, args, limit, out)
        except WorkerCrashError:
            return self._call(function, args, limit, out)

    def _call(
        self, function: Callable, args: tuple, limit: float | None, out: np.ndarray | None
    ) -> Any:
        worker = self._idle.get()
        if self._closed:
            self._idle.put(worker)
            raise WorkerCrashError("the pool is closed")
        try:
            return worker.call(function, args, limit, out)
        except RuntimeError as error:
            if self._closed:  # the pool may close while a process starts
                raise WorkerCrashError("the pool is closed") from error
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Stops all processes; later calls raise WorkerCrashError."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            worker.kill()
        stopped = []
        with contextlib.suppress(queue.Empty):
            for _ in self._workers:  # interrupted calls return their workers
                stopped.append(self._idle.get(timeout=_PATIENCE))
                stopped[-1].stop()
        for worker in stopped:  # wakes waiting callers one by one
            self._idle.put(worker)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process, started by the first call and restarted after a call that killed it."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._calls = 0
        self._is_closed = False

    def call(
        self, function: Callable, args: tuple, limit: float | None, out: np.ndarray | None
    ) -> Any:
        if self._process is None:
            self._start()
        assert self._connection is not None
        span = None if out is None else self._memory.span(out)
        try:
            self._connection.send_bytes(pickle.dumps((function, args, span)))
            if not self._connection.poll(limit):
                raise WorkerTimeoutError
            raised, result = pickle.loads(self._connection.recv_bytes())
        except WorkerTimeoutError:
            self.stop()
            raise
        except (EOFError, OSError) as error:
            code = self.stop()
            raise WorkerCrashError(f"the worker process exited with {_status(code)}") from error
        except BaseException:  # Ctrl-C: the pending answer must not go to the next call
            self.stop()
            raise
        self._calls += 1
        if self._calls >= CALLS:
            self.stop()
        if raised:
            raise result
        return result

    def _start(self) -> None:
        """Starts the process, again if it is killed from outside before it is ready."""
        status: int | None = None
        for _ in range(2):
            if self._try_to_start():
                return
            status = self.stop()
            if self._is_closed:
                break
        raise RuntimeError(f"a worker process did not start: {_status(status)}")

    def _try_to_start(self) -> bool:
        ours, theirs = multiprocessing.Pipe()
        descriptors = (theirs.fileno(), self._memory.descriptor)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                **_KEEP_MEMORY,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        theirs.close()
        self._connection, self._calls = ours, 0
        try:
            return ours.poll(START_LIMIT) and ours.recv_bytes() == b"ready"
        except (EOFError, OSError):
            return False

    def kill(self) -> None:
        """Kills the process for good; safe to call while another thread waits for its answer."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> int | None:
        """Stops the process and returns its exit status if it had already died.

        Only the thread that took the worker from the pool may call this.
        """
        code = None
        if self._process is not None:
            assert self._connection is not None
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # keeps the status of one that already died
                code = self._process.wait(0.1)
            self._process.kill()
            self._process.wait()
            self._connection.close()
        self._process = None
        return code

    def __del__(self) -> None:
        self.kill()


def _status(code: int | None) -> str:
    if code is None:
        return "no status"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _serve(connection: Connection, memory: MappedMemory) -> None:
    """Answers calls until the parent closes the connection."""
    connection.send_bytes(b"ready")
    while True:
        try:
            function, args, span = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            out = {} if span is None else {"out": memory.array(span)}
            raised, result = False, function(*args, **out)
        except Exception as error:
            raised, result = True, error
        connection.send_bytes(pickle.dumps((raised, result)))


def _end_with(parent: int) -> None:
    """Exits when the parent dies, so that a hanging call does not outlive it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection, descriptor = (int(text) for text in sys.argv[1:])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _serve(Connection(connection), MappedMemory(descriptor))


if __name__ == "__main__":
    main()
