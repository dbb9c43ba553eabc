"""Loss and accuracy over the validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from storm_jax.data.accounting import Accounting
from storm_jax.data.mixture import Mixture
from storm_jax.data.pipeline import batches
from storm_jax.data.plan import EvalPlan
from storm_jax.data.skips import DataError
from storm_jax.media.workers import WorkerPool
from storm_jax.run import Run
from storm_jax.train.feed import media_reader, place, process_share, visual_shape
from storm_jax.train.skip_log import SkipLog
from storm_jax.train.state import StateSpec, TrainState
from storm_jax.train.step import make_eval_step

Evaluator = Callable[[TrainState], Mapping[str, float]]


def make_validation(run: Run, spec: StateSpec, mixture: Mixture, pool: WorkerPool) -> Evaluator:
    """Mean loss and token accuracy over every sample of a mixture; it raises DataError when too many
    are unusable."""
    config, mesh = spec.config, spec.mesh
    log = SkipLog(run.path)
    log.write(mixture.skips)
    steps_by_shape = [make_eval_step(spec, visual_shape(shape)) for shape in mixture.shapes]
    size = config.train.batch_size // config.train.accumulation
    plan = EvalPlan(mixture, size)
    steps = range(len(plan))

    def evaluate(state: TrainState) -> dict[str, float]:
        totals = {"loss": 0.0, "weight": 0.0, "right": 0.0}
        accounting = Accounting([part.config.name for part in mixture.parts])
        reader = media_reader(config, pool, log)
        for batch in batches(mixture, plan, steps, size, reader, **process_share()):
            accounting.add(batch.outcomes)
            log.write(batch.skips)
            step = steps_by_shape[batch.shape]
            sums = jax.device_get(step(state, place(batch.arrays, mesh)))
            totals = {name: totals[name] + float(sums[name]) for name in totals}
        accounting.check(config.data.max_skip_fraction, "validation met")
        weight = totals["weight"]
        if not weight:
            raise DataError("no sample of data.val could be read")
        return {"val_loss": totals["loss"] / weight, "val_accuracy": totals["right"] / weight}

    return evaluate
