"""The training loop: evaluate, save, next batch, step - in this order.

The data position is saved with the weights before the next batch is taken, so that the two always
agree and a killed run continues with the losses it would have had.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from storm_jax.config import ConfigError, RunConfig
from storm_jax.data.accounting import Accounting
from storm_jax.data.mixture import Mixture, open_mixture
from storm_jax.data.pipeline import Batch, batches
from storm_jax.data.plan import TrainPlan
from storm_jax.data.skips import DataError
from storm_jax.media.workers import WorkerPool
from storm_jax.run import Run
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.feed import media_reader, place, process_share, visual_shape
from storm_jax.train.initialisation import begin
from storm_jax.train.metrics import MetricsWriter, Progress, duration
from storm_jax.train.skip_log import SkipLog
from storm_jax.train.state import StateSpec, TrainState
from storm_jax.train.step import make_train_step
from storm_jax.train.validation import Evaluator


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient is not a number; the batch is saved beside the run."""


def train(
    run: Run,
    mesh: Mesh,
    make_evaluators: Callable[[StateSpec, WorkerPool], Mapping[str, Evaluator]],
) -> None:
    """Trains the run's configuration to its last step, from its last checkpoint if it has one.

    Raises:
      ConfigError: when the mesh cannot split the batch.
      DataError: when too many samples are unusable, or the data is not what the run began with.
      NonFiniteLossError: at the first loss that is not finite.
    """
    config = run.config
    _check_batch(config, mesh)
    spec = StateSpec.make(config, mesh)
    with WorkerPool(config.data.num_workers) as pool:
        mixture = open_mixture(config, config.data.train, run.tokenizer(), pool)
        checkpointer = Checkpointer(run, spec)
        try:
            state, start, data = begin(run, spec, checkpointer, mixture)
            _describe(spec, mixture, start)
            loop = _Loop(run, spec, mixture, pool, checkpointer, start, data)
            loop.run(state, make_evaluators(spec, pool))
        finally:
            checkpointer.close()


class _Loop:
    """State of one pass through the loop that is not the model's."""

    def __init__(
        self,
        run: Run,
        spec: StateSpec,
        mixture: Mixture,
        pool: WorkerPool,
        checkpointer: Checkpointer,
        start: int,
        data: Mapping[str, Any],
    ):
        config = run.config
        self.run_path, self.spec, self.start = run.path, spec, start
        self.config = config.train
        self.mixture, self.pool, self.checkpointer = mixture, pool, checkpointer
        self.metrics = MetricsWriter(run.path, start, config.train.tensorboard)
        self.progress = Progress(start, config.train.steps, config.train.log_every)
        self.plan = TrainPlan(mixture, config.train.batch_size, data.get("plan"))
        names = [part.config.name for part in mixture.parts]
        self.accounting = Accounting(names, data.get("accounting"))
        self.step_functions: dict[int, Any] = {}  # jitted, by number of their shape
        self.skip_log = SkipLog(run.path)
        self.skip_log.write(mixture.skips)

    def run(self, state: TrainState, evaluators: Mapping[str, Evaluator]) -> None:
        config, mesh = self.config, self.spec.mesh
        reader = media_reader(self.spec.config, self.pool, self.skip_log)
        steps = range(self.start, config.steps)
        stream = batches(
            self.mixture, self.plan, steps, config.batch_size, reader, **process_share()
        )
        pending: tuple[int, Batch, dict] | None = None
        for step in range(self.start, config.steps + 1):
            last, resumed = step == config.steps, step == self.start
            results: dict[str, float] = {}
            evaluates = config.eval_every and (step % config.eval_every == 0 or last)
            saves = step % config.save_every == 0 or last
            if not resumed and (evaluates or saves):
                self._finish(pending)
                pending = None
                if evaluates:
                    try:
                        results = self._evaluate(step, state, evaluators)
                    except DataError:  # its files are gone; what was trained is kept
                        self.checkpointer.save(step, state, self._data_state(step), {})
                        raise
                if saves:
                    self.checkpointer.save(step, state, self._data_state(step), results)
            if last:
                break
            batch = next(stream)
            self._count(batch)
            with jax.set_mesh(mesh):
                step_function = self._step_function(batch.shape)
                state, metrics = step_function(state, place(batch.arrays, mesh))
            self._finish(pending)  # one step late, so that the device is never waited for
            pending = step + 1, batch, metrics
        self.metrics.close()
        print(self.accounting.table(), flush=True)

    def _step_function(self, number: int) -> Callable:
        """The compiled step of one shape of rows."""
        if number not in self.step_functions:
            shape = self.mixture.shapes[number]
            print(f"compiling rows of {shape.tokens} tokens and {shape.frames} frames", flush=True)
            self.step_functions[number] = make_train_step(self.spec, visual_shape(shape))
        return self.step_functions[number]

    def _count(self, batch: Batch) -> None:
        self.accounting.add(batch.outcomes)
        self.skip_log.write(batch.skips)
        self.accounting.check(self.spec.config.data.max_skip_fraction, "training met")

    def _finish(self, pending: tuple[int, Batch, dict] | None) -> None:
        if pending is None:
            return
        step, batch, metrics = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
            path = self.run_path / f"nonfinite_step_{step}.npz"
            ids = np.array(batch.sample_ids)
            np.savez(path, allow_pickle=False, sample_ids=ids, **batch.arrays)
            raise NonFiniteLossError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; samples "
                f"{', '.join(batch.sample_ids)}; the batch is in {path}"
            )
        values |= batch.waste()
        values["compilations"] = sum(f._cache_size() for f in self.step_functions.values())
        if step % self.config.log_every == 0 or step == self.config.steps:
            values |= self.accounting.metrics()
        self.metrics.write(step, values)
        self.progress.report(step, values)

    def _evaluate(
        self, step: int, state: TrainState, evaluators: Mapping[str, Evaluator]
    ) -> dict[str, float]:
        results: dict[str, float] = {}
        began = time.monotonic()
        with jax.set_mesh(self.spec.mesh):
            for evaluate in evaluators.values():
                results.update(evaluate(state))
        if results:
            self.metrics.write(step, results)
            listed = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
            print(f"step {step:>6}  {listed}  ({duration(time.monotonic() - began)})", flush=True)
        return results

    def _data_state(self, step: int) -> dict[str, Any]:
        self.plan.forget(step)
        return {
            "plan": self.plan.state(step),
            "sources": self.mixture.fingerprint(),
            "accounting": self.accounting.state(),
        }


def _check_batch(config: RunConfig, mesh: Mesh) -> None:
    rows, devices = config.train.batch_size, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows // config.train.accumulation % devices:
        raise ConfigError(
            f"train.batch_size={rows} in train.accumulation={config.train.accumulation} parts does "
            f"not split over mesh.data * mesh.fsdp = {devices} devices: every device would compute "
            f"all rows. Make each part a multiple of {devices}"
        )


def _describe(spec: StateSpec, mixture: Mixture, start: int) -> None:
    trained = sum(leaf.size for leaf in spec.shapes.trained.values())
    frozen = sum(leaf.size for leaf in spec.shapes.frozen.values())
    tokens, decoder = mixture.shapes[-1].tokens, spec.config.model.decoder
    if tokens > decoder.max_positions:
        logging.warning(
            "a sample may be longer than the %d positions that the decoder was trained for "
            "(model.decoder.max_positions): data.rows has %d tokens", decoder.max_positions, tokens
        )  # fmt: skip
    shapes = ", ".join(
        f"{shape.tokens} tokens and {shape.frames} frames" for shape in mixture.shapes
    )
    sources = ", ".join(f"{p.config.name} {len(p.usable):,}" for p in mixture.parts)
    print(
        f"{len(mixture):,} samples ({sources}; {len(mixture.skips)} unusable), rows of {shapes}; "
        f"parameters: {trained:,} trained, {frozen:,} frozen; mesh {dict(spec.mesh.shape)}; from step "
        f"{start}",
        flush=True,
    )
