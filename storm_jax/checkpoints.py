"""The parameters in a run's checkpoints: read whole or one at a time, and written at step 0.

Training writes its checkpoints in `storm_jax.train.checkpoint`. Every checkpoint contains digests.json, the
digests of its files, which are compared before it is read: Orbax does not notice a flipped bit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from storm_jax.files import changed_files, file_names, is_bucket, write_digests
from storm_jax.old_runs import current_names

_CHUNK_BYTES = 2**25  # larger chunks are compressed and copied whole on their way to the disk
_MIN_SLICE_BYTES = 2**20  # replicas share the writing of an array only in slices of this size


class RunError(RuntimeError):
    """A run folder or checkpoint that is missing, damaged or does not match."""


def array_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Writes and reads trees of arrays.

    Orbax splits every replicated array between the replicas, and compiles a program for each slice.
    Here one replica writes what is small.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **options)


def half_written(root: epath.Path) -> list[epath.Path]:
    """Checkpoints that are being written, or whose writing was interrupted.

    Orbax renames a complete folder; in a bucket, where nothing can be renamed, it adds a last file.
    """
    if not root.exists():  # an empty folder of a bucket
        return []
    steps = [path for path in root.iterdir() if path.name.partition(".")[0].isdigit()]
    return [path for path in steps if ocp.utils.is_tmp_checkpoint(path)]


def with_digests(
    root: epath.Path, barrier: ocp.multihost.BarrierSyncFn | None = None
) -> ocp.AsyncOptions:
    """Orbax's options to write digests.json into each checkpoint of a folder before it is committed.

    Args:
      barrier: at which all processes wait for each other before and after the commit.
    """

    def write() -> None:
        for folder in half_written(root):
            # Orbax writes the time of the commit into the file of this name.
            names = [
                name for name in file_names(folder) if not name.endswith("_CHECKPOINT_METADATA")
            ]
            write_digests(folder, [folder / name for name in names])

    return ocp.AsyncOptions(post_finalization_callback=write, barrier_sync_fn=barrier)


class Checkpoints:
    """The folder of a run with `STEP/{params, opt_state, data, meta}`, in a file system or at gs://.

    Parameters are flat dicts {path: array}. The environment variable STORM_VERIFY=0 skips comparing digests.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """
        Raises:
          RunError: if the path is a URL whose package is not installed.
        """
        self.path = epath.Path(path)
        if is_bucket(self.path):
            _prepare_gcsfs(self.path)
        self._verified: set[tuple[int, str]] = set()
        self._stored_names: dict[int, dict[str, str]] = {}

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending.

        Raises:
          RunError: if the folder cannot be read.
        """
        try:
            return sorted(ocp.utils.checkpoint_steps(self.path))
        except Exception as error:
            raise RunError(f"{self.path} cannot be read: {_first_line(error)}") from error

    def create(self) -> None:
        """Creates the folder, but not a bucket.

        Raises:
          RunError: if it cannot be created.
        """
        try:
            self.path.mkdir(parents=not is_bucket(self.path), exist_ok=True)
        except Exception as error:
            raise RunError(f"{self.path} cannot be created: {_first_line(error)}") from error

    def resolve(self, step: int | None) -> int:
        """Returns `step`, or the latest one if it is None.

        Raises:
          RunError: if there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise RunError(f"{self.path} has no checkpoint: train.py saves them")
        if step is not None and step not in steps:
            raise RunError(f"{self.path} has no checkpoint of step {step}; it has {steps}")
        return steps[-1] if step is None else step

    def written_at(self, step: int) -> int:
        """When a checkpoint was written, in nanoseconds since 1970.

        It distinguishes checkpoints of the same step in runs that were deleted and trained again.
        """
        with self.reading(step):
            path = self.path / str(step) / "_CHECKPOINT_METADATA"
            return int(json.loads(path.read_text())["init_timestamp_nsecs"])

    def verify(self, step: int, item: str = "") -> None:
        """Compares the files of a checkpoint with their digests, once. Earlier versions wrote none.

        Args:
          item: "params" and so on; all items by default.

        Raises:
          RunError: if a file has changed since the checkpoint was written.
        """
        if self._verified & {(step, item), (step, "")}:
            return
        with self.reading(step):
            changed = changed_files(self.path / str(step), item)
        if changed:
            raise self.damaged(step, f"{changed[0]} has changed since it was written")
        self._verified.add((step, item))

    def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter by path."""
        self.verify(step, "params")
        with self.reading(step):
            metadata = ocp.PyTreeCheckpointHandler().metadata(self.path / str(step) / "params")
            stored = flatten_dict(metadata.tree, sep="/")
        current = current_names(stored)
        self._stored_names[step] = {current[name]: name for name in stored}
        return {
            current[name]: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
            for name, leaf in stored.items()
        }

    def stored_names(self, step: int) -> dict[str, str]:
        """{name of a parameter: its name in the checkpoint}; earlier versions had other names."""
        if step not in self._stored_names:
            self.shapes(step)
        return self._stored_names[step]

    def restore(
        self, target: Mapping[str, jax.ShapeDtypeStruct], step: int
    ) -> dict[str, jax.Array]:
        """Reads all parameters.

        Args:
          target: shapes with the dtypes and shardings to restore to.

        Raises:
          RunError: if the checkpoint is damaged, or its parameters have other names or shapes.
        """
        stored = self.shapes(step)
        problems = [f"{name} is not in the checkpoint" for name in target.keys() - stored.keys()]
        problems += [f"{name} is only in the checkpoint" for name in stored.keys() - target.keys()]
        problems += [
            f"{name} is {stored[name].shape} in the checkpoint and {target[name].shape} in the model"
            for name in target.keys() & stored.keys()
            if stored[name].shape != target[name].shape
        ]
        if problems:
            listed = "\n  ".join(sorted(problems))
            raise RunError(f"checkpoint {step} of {self.path}:\n  {listed}")
        names = self.stored_names(step)
        tree = unflatten_dict({names[name]: leaf for name, leaf in target.items()}, sep="/")
        with self.reading(step):
            restored = ocp.StandardCheckpointHandler().restore(
                self.path / str(step) / "params", args=ocp.args.StandardRestore(tree)
            )
        arrays = flatten_dict(restored, sep="/")
        params = {name: arrays[names[name]] for name in target}
        finite = jax.device_get(_all_finite(params))
        if bad := sorted(name for name, is_finite in finite.items() if not is_finite):
            raise self.damaged(step, f"contains {bad[0]} with values that are not finite")
        return params

    def read(self, step: int, name: str, dtype: Any = None) -> np.ndarray:
        """Reads one parameter into host memory, in its stored dtype by default."""
        name = self.stored_names(step)[name]
        options = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        with self.reading(step):
            restored = ocp.PyTreeCheckpointHandler().restore(
                self.path / str(step) / "params",
                args=ocp.args.PyTreeRestore(
                    unflatten_dict({name: 0}, sep="/"),
                    unflatten_dict({name: options}, sep="/"),
                    partial_restore=True,
                ),
            )
        return flatten_dict(restored, sep="/")[name]

    def write_params(self, params: Mapping[str, jax.Array], meta: Mapping[str, Any]) -> None:
        """Writes a checkpoint of parameters only, at step 0.

        In addition to `params`, host memory holds at most a copy of the largest array and a few
        hundred megabytes of chunks on their way to the disk.

        Args:
          meta: plain JSON, stored with them.
        """
        self.create()
        largest = max(array.nbytes for array in params.values())
        handler = array_handler(save_device_host_concurrent_gb=math.ceil(largest / 1e9) + 1)
        nested = unflatten_dict(dict(params), sep="/")
        with ocp.CheckpointManager(
            self.path,
            item_handlers={"params": handler, "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=False, async_options=with_digests(self.path)
            ),
        ) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(
                        nested,
                        save_args=jax.tree.map(
                            lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), nested
                        ),
                        ocdbt_target_data_file_size=_CHUNK_BYTES,
                    ),
                    meta=ocp.args.JsonSave({"step": 0, **meta}),
                ),
            )
            manager.wait_until_finished()

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Raises a RunError for any error while a checkpoint's files are read."""
        try:
            yield
        except Exception as error:
            raise self.damaged(step, f"cannot be read: {_first_line(error)}") from error

    def damaged(self, step: int, problem: str) -> RunError:
        """The error for a checkpoint that cannot be used, with the remedy."""
        earlier = [other for other in self.steps() if other < step]
        remedy = "There is no earlier one"
        if earlier:
            listed = ", ".join(map(str, earlier))
            remedy = (
                f"Earlier ones: {listed}. Choose one with --step, or remove {self.path / str(step)} to "
                f"resume training from step {earlier[-1]}"
            )
        return RunError(f"checkpoint {step} of {self.path}: {problem}. {remedy}")


def _prepare_gcsfs(path: epath.Path) -> None:
    """Checks that etils can reach a bucket, and that it sees what TensorStore and other processes write.

    Raises:
      RunError: if gcsfs is missing.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise RunError(f"{path} needs gcsfs: pip install gcsfs")
    import fsspec  # gcsfs depends on it

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0][:200] or type(error).__name__


@jax.jit
def _all_finite(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(value).all() for name, value in params.items()}
