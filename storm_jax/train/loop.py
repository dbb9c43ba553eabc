"""The training loop: evaluate, save, next batch, step - in this order.

The data position is saved with the weights before the next batch is taken, so that the two always
agree and a killed run continues with the losses it would have had.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from storm_jax import config as config_lib
from storm_jax.config import ConfigError, RunConfig
from storm_jax.data.accounting import Accounting
from storm_jax.data.mixture import Mixture, open_mixture
from storm_jax.data.pipeline import Batch, batches
from storm_jax.data.plan import EvalPlan, TrainPlan
from storm_jax.data.rows import RowShape
from storm_jax.data.skips import DataError, Skip
from storm_jax.files import read_lines, write_lines
from storm_jax.media.reader import LASTING, MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.models.lora import is_adapter, merge
from storm_jax.models.storm import VisualShape
from storm_jax.params import abstract_model, flatten, random_params, unflatten, with_sharding
from storm_jax.run import Run, RunError
from storm_jax.sharding import batch_sharding, param_shardings
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.metrics import MetricsWriter, Progress, duration
from storm_jax.train.state import StateSpec, TrainState
from storm_jax.train.step import make_eval_step, make_train_step

_SHOWN = 20  # of samples that are found to be unusable at once, those that are shown

Evaluator = Callable[[TrainState], Mapping[str, float]]


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
            state, start, data = _begin(run, spec, checkpointer, mixture)
            _describe(spec, mixture, start)
            loop = _Loop(run, spec, mixture, pool, checkpointer, start, data)
            loop.run(state, make_evaluators(spec, pool))
        finally:
            checkpointer.close()


def make_validation(run: Run, spec: StateSpec, mixture: Mixture, pool: WorkerPool) -> Evaluator:
    """Mean loss and token accuracy over every sample of a mixture; it raises DataError when too many
    are unusable."""
    config, mesh = spec.config, spec.mesh
    log = _SkipLog(run.path)
    log.write(mixture.skips)
    steps_by_shape = [make_eval_step(spec, _visual_shape(shape)) for shape in mixture.shapes]
    size = config.train.batch_size // config.train.accumulation
    plan = EvalPlan(mixture, size)
    steps = range(len(plan))

    def evaluate(state: TrainState) -> dict[str, float]:
        totals = {"loss": 0.0, "weight": 0.0, "right": 0.0}
        accounting = Accounting([part.config.name for part in mixture.parts])
        reader = _reader(config, pool, log)
        for batch in batches(mixture, plan, steps, size, reader, **_share()):
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


def place(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows to global arrays over the mesh."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh, array), array)
        for name, array in arrays.items()
    }


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
        self.skip_log = _SkipLog(run.path)
        self.skip_log.write(mixture.skips)

    def run(self, state: TrainState, evaluators: Mapping[str, Evaluator]) -> None:
        config, mesh = self.config, self.spec.mesh
        reader = _reader(self.spec.config, self.pool, self.skip_log)
        steps = range(self.start, config.steps)
        stream = batches(self.mixture, self.plan, steps, config.batch_size, reader, **_share())
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
            self.step_functions[number] = make_train_step(self.spec, _visual_shape(shape))
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


def _begin(
    run: Run, spec: StateSpec, checkpointer: Checkpointer, mixture: Mixture
) -> tuple[TrainState, int, dict[str, Any]]:
    """State, step and data position of the last checkpoint; else the parameters of `init_from`; else
    random ones."""
    restored = checkpointer.restore_latest()
    if restored is not None:
        state, data = restored
        now = mixture.fingerprint()
        changed = [name for name, told in data["sources"].items() if now.get(name) != told]
        if changed:
            raise DataError(
                f"data source {', '.join(changed)} is not what {run.path} began with: samples were "
                f"added, removed, reordered or changed in text or length. Restore it, or start a new "
                f"run with --config.init_from={run.path}"
            )
        return state, int(state.step), data
    if run.config.init_from:
        return spec.from_params(load_params(Run(run.config.init_from), spec)), 0, {}
    return spec.init(), 0, {}


def load_params(source: Run, spec: StateSpec) -> dict:
    """Another run's parameters on this mesh.

    Adapters go on when they are the same in both; else those of the source are merged into its
    decoder, and new ones begin.

    Raises:
      RunError: when its model is another one.
    """
    theirs, ours = source.config.model.decoder, spec.config.model.decoder
    changed = config_lib.differences(
        config_lib.to_dict(source.config.model), config_lib.to_dict(spec.config.model)
    )
    mine = ("decoder.lora.", "dtype")  # what weights do not depend on
    changed = {name: values for name, values in changed.items() if not name.startswith(mine)}
    if changed:
        listed = "\n  ".join(f"model.{k}: {a!r} there, {b!r} here" for k, (a, b) in changed.items())
        raise RunError(f"init_from={source.path} has another model:\n  {listed}")
    step = source.checkpoint_step()
    target = flatten(with_sharding(spec.shapes, spec.shardings).params())
    if theirs.lora == ours.lora:
        return source.restore_params(unflatten(target), step)
    fresh = {name: leaf.sharding for name, leaf in target.items() if is_adapter(name)}
    wanted = {name: leaf for name, leaf in target.items() if name not in fresh}
    _, abstract = abstract_model(source.config.model)
    places = flatten(param_shardings(abstract, spec.mesh))
    adapters = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in flatten(nnx.to_pure_dict(abstract)).items()
        if is_adapter(name)
    }
    restored = flatten(source.restore_params(unflatten(wanted | adapters), step))
    with jax.set_mesh(spec.mesh):
        merged = jax.jit(
            lambda base, adapters: merge(base | adapters, theirs.lora),
            out_shardings={name: leaf.sharding for name, leaf in wanted.items()},
            donate_argnums=0,
        )({n: restored[n] for n in wanted}, {n: restored[n] for n in adapters})
        new = random_params(spec.config.model, spec.config.train.seed, fresh)
    return unflatten(merged | new)


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


def _visual_shape(shape: RowShape) -> VisualShape:
    return VisualShape(shape.num_groups, shape.compression.spatial_pool)


def _share() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def _reader(config: RunConfig, pool: WorkerPool, log: _SkipLog) -> MediaReader:
    return MediaReader(pool, config.model.vision.image_size, config.data.frames, log.lasting)


class _SkipLog:
    """Lists each unusable sample once in skipped.jsonl, and warns of it.

    `lasting` are the causes of media that hung or crashed a worker, by name: they are not tried again.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "skipped.jsonl"
        self._logged: set[tuple[str, str, str]] = set()
        self.lasting: dict[str, str] = {}
        if self._path.exists():
            lines = read_lines(self._path)
            for line in lines:
                self._remember(Skip(**line))
            # A last line that was cut off goes.
            write_lines(self._path, lines)

    def write(self, skips: Sequence[Skip]) -> None:
        new = [skip for skip in skips if self._remember(skip)]
        if not new:
            return
        for skip in new[:_SHOWN]:
            logging.warning("skipped (%s): %s: %s", skip.cause, skip.where, skip.message)
        if len(new) > _SHOWN:
            logging.warning("and %d more: %s", len(new) - _SHOWN, self._path)
        with self._path.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in new)

    def _remember(self, skip: Skip) -> bool:
        """Whether it is new."""
        if skip.cause in LASTING:
            self.lasting[skip.file] = skip.cause
        key = (skip.source, skip.where, skip.cause)
        known = key in self._logged
        self._logged.add(key)
        return not known
