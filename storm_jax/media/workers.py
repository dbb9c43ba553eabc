"""Processes that call functions with a time limit, so that a hang or a crash costs one call.

They are programs of their own, not forks (JAX has threads) and not multiprocessing's children (which
import the main script, and JAX with it). Calls and small results go through a socket, arrays through
memory that both sides map.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

START_LIMIT = 120.0  # seconds
# A process ends after so many calls: decoders leak a kilobyte or two with every file.
CALLS = 4000
_PATIENCE = 10.0  # seconds


class WorkerTimeoutError(TimeoutError):
    """A call took longer than its limit; its process was killed."""


class WorkerCrashError(RuntimeError):
    """The process of a call died."""


class WorkerPool:
    """`count` processes; with 0, calls run in the calling thread and have no limit.

    `call` may be used from any number of threads; each waits for a free process.
    """

    def __init__(self, count: int):
        self.count = count
        self._closed = False
        self._workers = [_Worker() for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def call(
        self,
        function: Callable,
        *args: Any,
        limit: float | None = None,
        room: np.ndarray | None = None,
    ) -> Any:
        """`function(*args)`; function, arguments and result must be picklable, and the function
        importable by name. What it raises is raised here.

        Args:
          limit: seconds.
          room: contiguous memory that the first array of the result is written into, and is then a view
            of, when it has that size and comes from another process.

        Raises:
          WorkerTimeoutError: after `limit` seconds.
          WorkerCrashError: when the process died.
        """
        if not self.count:
            return function(*args)
        worker = self._idle.get()
        if self._closed:
            self._idle.put(worker)
            raise WorkerCrashError("the pool is closed")
        try:
            return worker.call(function, args, limit, room)
        except RuntimeError as error:
            if self._closed:  # which may have been while the process started
                raise WorkerCrashError("the pool is closed") from error
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes; later calls raise WorkerCrashError."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            worker.kill()
        stopped = []
        with contextlib.suppress(queue.Empty):
            for _ in self._workers:  # a call that was interrupted gives its worker back
                stopped.append(self._idle.get(timeout=_PATIENCE))
                stopped[-1].stop()
        for worker in stopped:  # those that wait for one are told, one after another
            self._idle.put(worker)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process, started at its first call and again after each that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._shared: _SharedMemory | None = None
        self._calls = 0

    def call(
        self, function: Callable, args: tuple, limit: float | None, room: np.ndarray | None
    ) -> Any:
        if self._process is None:
            self._start()
        assert self._connection is not None and self._shared is not None
        try:
            self._connection.send_bytes(pickle.dumps((function, args)))
            if not self._connection.poll(limit):
                raise WorkerTimeoutError
            raised, payload, sizes = pickle.loads(self._connection.recv_bytes())
        except WorkerTimeoutError:
            self.stop()
            raise
        except (EOFError, OSError) as error:
            code = self.stop()
            raise WorkerCrashError(
                f"the process that read it ended with {_status(code)}"
            ) from error
        except BaseException:  # Ctrl-C: its answer would be taken for that of the next call
            self.stop()
            raise
        result = pickle.loads(payload, buffers=self._shared.read(sizes, room))
        self._calls += 1
        if self._calls >= CALLS:
            self.stop()
        if raised:
            raise result
        return result

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._shared = _SharedMemory(_anonymous_file())
        descriptors = (theirs.fileno(), self._shared.descriptor)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self._connection, self._calls = ours, 0
        try:
            started = ours.poll(START_LIMIT) and ours.recv_bytes() == b"ready"
        except (EOFError, OSError):
            started = False
        if not started:
            raise RuntimeError(f"a worker process did not start: {_status(self.stop())}")

    def kill(self) -> None:
        """Ends the process, whoever waits for it."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> int | None:
        """Ends the process and forgets it; for whoever took the worker from the pool. Gives the status
        of one that died by itself."""
        code = None
        if self._process is not None:
            assert self._connection is not None and self._shared is not None
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that died has its own status
                code = self._process.wait(0.1)
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._shared.close()
        self._process = None
        return code

    def __del__(self) -> None:
        self.kill()


class _SharedMemory:
    """A file without a name that both processes map; it grows with the largest result."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    def write(self, buffers: list[pickle.PickleBuffer]) -> list[int]:
        """Puts buffers one after another; returns their sizes."""
        raw = [buffer.raw() for buffer in buffers]
        total = sum(view.nbytes for view in raw)
        if total:
            if os.fstat(self.descriptor).st_size < total:
                os.ftruncate(self.descriptor, total)
            mapped, offset = self._mapped(total), 0
            for view in raw:
                mapped[offset : offset + view.nbytes] = view
                offset += view.nbytes
        return [view.nbytes for view in raw]

    def read(self, sizes: list[int], room: np.ndarray | None) -> list[Any]:
        """Copies of buffers of these sizes, the first of them in `room` when it has that size."""
        if not sum(sizes):
            return [bytearray() for _ in sizes]
        copies: list[Any] = []
        offset = 0
        with memoryview(self._mapped(sum(sizes))) as view:
            for size in sizes:
                part = view[offset : offset + size]
                if room is not None and not copies and size == room.nbytes:
                    room.reshape(-1).view(np.uint8)[:] = part
                    copies.append(room)
                else:
                    copies.append(bytearray(part))
                part.release()
                offset += size
        return copies

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        return self._map

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        os.close(self.descriptor)


def _anonymous_file() -> int:
    # Not limited by the size of /dev/shm, which is small in containers.
    if hasattr(os, "memfd_create"):
        return os.memfd_create("storm-frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _status(code: int | None) -> str:
    if code is None:
        return "no status"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _serve(connection: Connection, shared: _SharedMemory) -> None:
    """Answers calls until the other side is gone."""
    connection.send_bytes(b"ready")
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            raised, result = False, function(*args)
        except Exception as error:
            raised, result = True, error
        buffers: list[pickle.PickleBuffer] = []
        payload = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
        connection.send_bytes(pickle.dumps((raised, payload, shared.write(buffers))))


def _end_with(parent: int) -> None:
    """A call that hangs must not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection, descriptor = (int(text) for text in sys.argv[1:])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _serve(Connection(connection), _SharedMemory(descriptor))


if __name__ == "__main__":
    main()
