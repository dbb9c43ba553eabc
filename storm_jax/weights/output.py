"""Output folders of the commands: checked before the work starts, and complete or absent after it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from storm_jax.weights import WeightsError

_FRESH = 10.0  # seconds


def check_output(out: pathlib.Path) -> pathlib.Path:
    """Returns the resolved output folder, after creating its parents.

    Raises:
      WeightsError: if it is not empty, or cannot be created.
    """
    path = out.expanduser().resolve()
    try:
        if path.exists() and any(path.iterdir()):
            raise WeightsError(f"--out={out} exists; nothing is overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"--out={out} cannot be a folder: {error}") from error
    return path


@contextlib.contextmanager
def atomic_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder, which is renamed to `out` at the end, or deleted on any error.

    Folders that killed processes left are deleted first.
    """
    prefix = f"{out.name}.storm-"
    for leftover in out.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        with contextlib.suppress(OSError), _locked(leftover):
            if time.time() - leftover.stat().st_mtime > _FRESH:  # it may not be locked yet
                shutil.rmtree(leftover)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=out.parent))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            stack.enter_context(_locked(partial))
        try:
            yield partial
            partial.chmod(0o755)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with the process. Raises OSError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
