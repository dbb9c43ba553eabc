"""Saves the training state and restores it exactly."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import checkpoint_managers as managers

from storm_jax import distributed
from storm_jax.checkpoints import array_handler, half_written, with_digests
from storm_jax.files import system_error
from storm_jax.params import with_sharding
from storm_jax.run import Run, RunError
from storm_jax.train.state import StateSpec, TrainState

_PROBE_BYTES = 2**16
_MAX_FAILURES = 3  # saves in a row
_PAUSES = (1.0, 10.0)  # seconds before the last checkpoint is tried again


class Checkpointer:
    """Writes checkpoints `STEP/{params, opt_state, data, meta}` of a run asynchronously.

    Keeps the last `train.keep_last`, and the `train.keep_best` with the lowest validation loss. A save that
    fails on any process, because the folder is full, read-only or gone, fails on all of them: it is a warning,
    and the next save tries again. The third failure in a row is an error.
    """

    def __init__(self, run: Run, spec: StateSpec):
        self._run, self._spec = run, spec
        self._root = run.checkpoints.path
        self._failures = 0  # in a row
        self._saving: int | None = None  # the step that is being written
        self._problem = ""  # why this process could not write it
        if distributed.is_main():
            run.checkpoints.create()
            self._remove_partial()
        distributed.barrier("checkpoint folder")
        self._manager, self._is_open = self._open(), True

    def _open(self) -> ocp.CheckpointManager:
        train, root = self._run.config.train, self._root
        policies = [managers.LatestN(n=train.keep_last)]
        tracks_best = train.keep_best and train.eval_every and self._run.config.data.val
        if tracks_best:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics["val_loss"],
                    reverse=True,  # descending; the last n are kept: the smallest losses
                    n=train.keep_best,
                    keep_checkpoints_without_metrics=False,  # of earlier versions
                )
            )
        self._vote = distributed.Vote("save")
        return ocp.CheckpointManager(
            root,
            item_handlers={
                "params": array_handler(),
                "opt_state": array_handler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,
                async_options=with_digests(root, self._vote.barrier),
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count())),
                    barrier_sync_key_prefix=self._vote.name,
                ),
                preservation_policy=managers.AnyPreservationPolicy(policies),
                best_fn=(lambda metrics: metrics["val_loss"]) if tracks_best else None,
                best_mode="min",
            ),
        )

    def save(
        self, step: int, state: TrainState, data: dict[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Starts writing a checkpoint. Returns once the arrays are copied, so the state may be donated.

        Args:
          data: the data position, plain JSON.
          metrics: of the validation at this step, if there was one.
        """
        self._finish()
        self._saving = step
        if any(distributed.gather(self._probe())):
            self._finish()
            return
        try:
            if not self._is_open:
                self._manager, self._is_open = self._open(), True
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(unflatten_dict(state.params(), sep="/")),
                    opt_state=ocp.args.PyTreeSave(state.opt_state),
                    data=ocp.args.JsonSave(data),
                    meta=ocp.args.JsonSave({"step": step, **metrics}),
                ),
                metrics={"val_loss": metrics.get("val_loss", math.inf)},
            )
            if not saved and step not in self._manager.all_steps():
                raise RunError("Orbax did not save it")
        except Exception as error:
            self._note(error)

    def save_now(
        self, step: int, state: TrainState, data: dict[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Writes a checkpoint, tries again if it fails, and returns when it is on disk.

        Raises:
          RunError: as `save`.
        """
        for pause in (*_PAUSES, 0.0):
            self.save(step, state, data, metrics)
            if self._finish():
                return
            time.sleep(pause)

    def poll(self) -> None:
        """Tells the other processes if this one has failed to write; costs nothing."""
        try:
            if self._is_open:
                self._manager.check_for_errors()
        except Exception as error:
            self._note(error)

    def _probe(self) -> str:
        """Why nothing can be written to the folder, "" if it can be."""
        probe = self._root / f"probe.{jax.process_index()}.tmp"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
            probe.unlink()
        except Exception as error:
            self._note(error)
        return self._problem

    def _note(self, error: BaseException) -> None:
        """Remembers the first reason why this process could not write the checkpoint."""
        if not self._problem:
            first_line = (str(error) or repr(error)).split("\n", maxsplit=1)[0]
            self._problem = system_error(error) or first_line[:200]
            self._vote.fail(self._problem)

    def _finish(self) -> bool:
        """Waits until all processes have written the last checkpoint; returns whether they could.

        Raises:
          RunError: at the third failure in a row.
        """
        if self._saving is None:
            return True
        if not self._problem:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                self._note(error)
        step, self._saving = self._saving, None
        problems = list(filter(None, distributed.gather(self._problem)))
        if not problems:
            self._failures = 0
            return True
        self._failures += 1
        self._start_again()
        problem = f"checkpoint {step} could not be saved ({problems[0]})"
        try:
            complete = f"complete checkpoints: {self._run.checkpoints.steps()}"
        except RunError as error:
            complete = str(error)
        if self._failures == _MAX_FAILURES:
            raise RunError(
                f"{self._run.path}: {problem}, nor could the {_MAX_FAILURES - 1} before it; {complete}. Make "
                f"the folder writable, free space, and run the same command to resume"
            )
        logging.warning("%s: %s; %s. Training continues", self._run.path, problem, complete)
        return False

    def _start_again(self) -> None:
        """Drops what is left of a failed save."""
        with contextlib.suppress(Exception):  # it reports the failure again
            self._manager.close()
        self._problem = ""
        if distributed.is_main():
            with contextlib.suppress(Exception):  # the next save reports it
                self._root.mkdir(exist_ok=True)
                self._remove_partial()
        self._is_open = False

    def _remove_partial(self) -> None:
        """Removes half-written checkpoints."""
        for folder in half_written(self._root):
            folder.rmtree()
        for probe in self._root.glob("probe.*.tmp"):
            probe.unlink()

    def restore_latest(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest state and its data position, or None if there is no checkpoint.

        Raises:
          RunError: if the checkpoint is damaged, has parameters of other names or shapes, or has no
            optimizer state.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        if not (self._run.checkpoints.path / str(step) / "opt_state").exists():
            raise RunError(
                f"{self._run.path} contains imported weights, which other runs start from. Train in "
                f"another --workdir with --config.init_from={self._run.path}"
            )
        with distributed.main_first("verified"):
            if distributed.is_main():  # for all: the files are large
                self._run.checkpoints.verify(step)
        target = with_sharding(self._spec.shapes, self._spec.shardings)
        params = self._run.checkpoints.restore(target.params(), step)
        names = self._run.checkpoints.stored_names(step)
        opt_state = _rename_keys(target.opt_state, names)
        with self._run.checkpoints.reading(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    opt_state=ocp.args.PyTreeRestore(
                        opt_state, ocp.checkpoint_utils.construct_restore_args(opt_state)
                    ),
                    data=ocp.args.JsonRestore(),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        state = TrainState(
            {name: params[name] for name in target.trained},
            {name: params[name] for name in target.frozen},
            _rename_keys(restored["opt_state"], {old: new for new, old in names.items()}),
            _scalar(restored["meta"]["step"], target.step),
        )
        return state, restored["data"]

    def close(self) -> None:
        """Waits until what is being saved is on disk, even if the training has failed."""
        if self._is_open:
            self._manager.close()


def _rename_keys(tree: Any, names: Mapping[str, str]) -> Any:
    """A tree with other keys in its dicts."""
    if isinstance(tree, Mapping):
        return {names.get(key, key): _rename_keys(value, names) for key, value in tree.items()}
    if isinstance(tree, tuple):
        parts = (_rename_keys(part, names) for part in tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def _scalar(value: int, target: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.asarray(value, target.dtype), target.sharding)
