"""The parameters in a run's checkpoints: read whole or one at a time, and written at step 0.

Training writes its checkpoints in `storm_jax.train.checkpoint`.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

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


class Checkpoints:
    """The folder `checkpoints/STEP/{params, opt_state, data, meta}` of a run.

    Parameters are flat dicts {path: array}.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(ocp.utils.checkpoint_steps(self.path)) if self.path.is_dir() else []

    def resolve(self, step: int | None) -> int:
        """Returns `step`, or the latest one if it is None.

        Raises:
          RunError: if there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise RunError(f"{self.path.parent} has no checkpoint: train.py saves them")
        if step is not None and step not in steps:
            raise RunError(f"{self.path.parent} has no checkpoint of step {step}; it has {steps}")
        return steps[-1] if step is None else step

    def written_at(self, step: int) -> int:
        """When a checkpoint was written, in nanoseconds since 1970.

        It distinguishes checkpoints of the same step in runs that were deleted and trained again.
        """
        with self.reading(step):
            path = self.path / str(step) / "_CHECKPOINT_METADATA"
            return int(json.loads(path.read_text())["init_timestamp_nsecs"])

    def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter by path."""
        with self.reading(step):
            metadata = ocp.PyTreeCheckpointHandler().metadata(self.path / str(step) / "params")
            return {
                name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
                for name, leaf in flatten_dict(metadata.tree, sep="/").items()
            }

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
            raise RunError(f"checkpoint {step} of {self.path.parent}:\n  {listed}")
        with self.reading(step):
            restored = ocp.StandardCheckpointHandler().restore(
                self.path / str(step) / "params",
                args=ocp.args.StandardRestore(unflatten_dict(dict(target), sep="/")),
            )
        return flatten_dict(restored, sep="/")

    def read(self, step: int, name: str, dtype: Any = None) -> np.ndarray:
        """Reads one parameter into host memory, in its stored dtype by default."""
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
        largest = max(array.nbytes for array in params.values())
        handler = array_handler(save_device_host_concurrent_gb=math.ceil(largest / 1e9) + 1)
        nested = unflatten_dict(dict(params), sep="/")
        with ocp.CheckpointManager(
            self.path,
            item_handlers={"params": handler, "meta": ocp.JsonCheckpointHandler()},
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
            raise RunError(
                f"checkpoint {step} of {self.path.parent} cannot be read: {error}"
            ) from error
