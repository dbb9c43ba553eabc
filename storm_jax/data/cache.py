"""Arrays computed once, cached on disk and memory-mapped afterwards."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable, Mapping

import numpy as np

from storm_jax.data.skips import DataError
from storm_jax.files import changed_files, digest, write_digests


def cached_arrays(
    folder: pathlib.Path,
    name: str,
    key: str,
    compute: Callable[[], Mapping[str, np.ndarray]],
    keep: Callable[[Mapping[str, np.ndarray]], bool] = lambda arrays: True,
) -> dict[str, np.ndarray]:
    """Returns the arrays of `compute()`, cached in `folder` under `name` and `key`.

    The cache is written atomically and may be deleted at any time. Arrays that `keep` rejects are not cached.

    Raises:
      DataError: the folder is not writable.
    """
    target = folder / f"{name}-{digest(key)}"
    arrays = _load(target)
    if arrays is None:
        computed = compute()
        if not keep(computed):
            return dict(computed)
        try:
            _write(target, computed)
        except OSError as error:
            raise DataError(
                f"{folder} is not writable ({error}): set data.index_dir to a writable folder"
            ) from error
        arrays = _load(target)
    assert arrays is not None
    return arrays


def _write(target: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the cache. If several processes do so at once, the first one wins."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        write_digests(partial, partial.iterdir())
        if target.exists() and _load(target) is None:
            shutil.rmtree(target)  # damaged
        try:
            partial.rename(target)
        except OSError:
            if _load(target) is None:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    """None if there is no undamaged cache."""
    if not folder.is_dir() or changed_files(folder):
        return None
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError):  # truncated by a full disk
        return None
