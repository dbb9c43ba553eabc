"""The folder that a command writes: free before it begins, whole or not there when it ends."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from storm_jax.weights import WeightsError


def free_folder(out: pathlib.Path) -> pathlib.Path:
    """The folder to write, behind links, made ready so that a bad path is found before the work.

    Raises:
      WeightsError: when something is there, or it cannot be made.
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
def written_whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `out` that takes its name at the end, or is gone when anything is raised."""
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
