"""Loss and accuracy on the validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from storm_jax.data.mixture import Mixture
from storm_jax.data.pipeline import batches
from storm_jax.data.plan import EvalPlan
from storm_jax.data.skips import DataError
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.run import Run
from storm_jax.sharding import local_rows
from storm_jax.train.books import Books
from storm_jax.train.skip_log import SkipLog
from storm_jax.train.state import StateSpec, TrainState
from storm_jax.train.step import make_eval_step, place

Evaluator = Callable[[TrainState], Mapping[str, float]]


def make_validation(run: Run, spec: StateSpec, mixture: Mixture, pool: WorkerPool) -> Evaluator:
    """Returns a function that computes mean loss and token accuracy over all samples of a mixture.

    The function raises DataError if too many samples are unusable.
    """
    config, mesh = spec.config, spec.mesh
    skip_log = SkipLog(run.path)
    skip_log.write(mixture.skips)
    eval_steps = [make_eval_step(spec, shape) for shape in mixture.shapes]
    batch_size = config.train.batch_size // config.train.accumulation
    plan, rows = EvalPlan(mixture, batch_size), local_rows(mesh, batch_size)

    def evaluate(state: TrainState) -> dict[str, float]:
        totals = {"loss": 0.0, "weight": 0.0, "right": 0.0}
        names = [part.config.name for part in mixture.parts]
        books = Books(names, rows, skip_log, config.data.max_skip_fraction, "validation met")
        reader = MediaReader(
            pool, config.model.vision.image_size, config.data.frames, skip_log.lasting_failures
        )
        for batch in batches(mixture, plan, range(len(plan)), rows.held, reader):
            books.add(batch.rows)
            sums = jax.device_get(eval_steps[batch.shape](state, place(batch.arrays, mesh, rows)))
            totals = {name: totals[name] + float(sums[name]) for name in totals}
        books.exchange()
        weight = totals["weight"]
        if not weight:
            raise DataError("data.val: no sample could be read")
        return {"val_loss": totals["loss"] / weight, "val_accuracy": totals["right"] / weight}

    return evaluate
