"""Saves the training state and restores it exactly."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import checkpoint_managers as managers

from storm_jax.checkpoints import array_handler, with_digests
from storm_jax.params import with_sharding
from storm_jax.run import Run, RunError
from storm_jax.train.state import StateSpec, TrainState


class Checkpointer:
    """Writes checkpoints `checkpoints/STEP/{params, opt_state, data, meta}` of a run asynchronously.

    Keeps the last `train.keep_last`, and the `train.keep_best` with the lowest validation loss.
    """

    def __init__(self, run: Run, spec: StateSpec):
        self._run, self._spec = run, spec
        root = run.checkpoints.path
        for leftover in root.glob("*.orbax-checkpoint-tmp"):  # of an interrupted run
            shutil.rmtree(leftover)
        root.mkdir(exist_ok=True)
        train = run.config.train
        policies = [managers.LatestN(n=train.keep_last)]
        tracks_best = train.keep_best and train.eval_every and run.config.data.val
        if tracks_best:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics["val_loss"],
                    reverse=True,  # descending; the last n are kept: the smallest losses
                    n=train.keep_best,
                    keep_checkpoints_without_metrics=False,  # of earlier versions
                )
            )
        self._manager = ocp.CheckpointManager(
            root,
            item_handlers={
                "params": array_handler(),
                "opt_state": array_handler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                async_options=with_digests(root),
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
            raise RunError(f"{self._run.path}: checkpoint {step} was not saved")

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
        """Waits until everything saved is on disk."""
        self._manager.wait_until_finished()
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
