"""The training loop: evaluate, save, next batch, step.

Weights and data position are saved together, before the next batch is taken. They always agree, so
an interrupted run resumes with exactly the losses it would have had.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from storm_jax import distributed
from storm_jax.chips import chip_of
from storm_jax.data.mixture import Mixture, open_mixture
from storm_jax.data.pipeline import Batch, batches
from storm_jax.data.plan import TrainPlan
from storm_jax.data.skips import DataError
from storm_jax.flops import train_work
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.run import Run
from storm_jax.sharding import local_rows
from storm_jax.train.books import Books
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.initialisation import Start, find_start
from storm_jax.train.metrics import MetricsWriter, Progress, duration
from storm_jax.train.profile import StepProfile
from storm_jax.train.skip_log import SkipLog
from storm_jax.train.state import StateSpec, TrainState
from storm_jax.train.step import check_batch, make_train_step, place
from storm_jax.train.stop import StopRequest
from storm_jax.train.validation import Evaluator

_READ_MARGIN = 15.0  # seconds that a batch may take longer than the time limit of a file
_LARGEST = 3  # replicated parameters that are listed


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient norm is not finite; the batch is saved in the run folder."""


def train(
    run: Run,
    mesh: Mesh,
    make_evaluators: Callable[[StateSpec, WorkerPool], Mapping[str, Evaluator]],
) -> int | None:
    """Trains a run to its last step, from its latest checkpoint if it has one.

    Args:
      make_evaluators: returns the evaluators to run every `train.eval_every` steps.

    Returns:
      None, or the step after which it stopped because of SIGTERM; it is saved.

    Raises:
      ConfigError: if the batch does not divide over the mesh.
      DataError: if too many samples are unusable, or the data changed since the run started.
      NonFiniteLossError: at the first loss that is not finite.
    """
    config = run.config
    check_batch(config, mesh)
    spec = StateSpec.make(config, mesh)
    with WorkerPool(config.data.num_workers) as pool:
        with distributed.main_first("data"):  # it measures lengths, which the others read
            mixture = open_mixture(config, config.data.train, run.tokenizer(), pool)
        _check_same_data(mixture)
        with contextlib.closing(Checkpointer(run, spec)) as checkpointer:
            start = find_start(run, spec, checkpointer, mixture)
            _print_summary(spec, mixture, start.step)
            loop = _Loop(
                run=run,
                spec=spec,
                mixture=mixture,
                pool=pool,
                checkpointer=checkpointer,
                evaluators=make_evaluators(spec, pool),
                start=start,
            )
            return loop.run(start.state)


class _StepResult(NamedTuple):
    """A step whose metrics may still be on their way from the device."""

    step: int
    batch: Batch
    metrics: dict[str, jax.Array]
    books: dict[str, float]


class _Loop:
    """The loop, and everything but the model's state that changes with it."""

    def __init__(
        self,
        *,
        run: Run,
        spec: StateSpec,
        mixture: Mixture,
        pool: WorkerPool,
        checkpointer: Checkpointer,
        evaluators: Mapping[str, Evaluator],
        start: Start,
    ):
        config = run.config
        self._run, self._spec, self._start_step = run, spec, start.step
        self._config = config.train
        self._mixture, self._checkpointer, self._evaluators = mixture, checkpointer, evaluators
        skip_log = SkipLog(run.path)
        skip_log.write(mixture.skips)
        self._rows = local_rows(spec.mesh, config.train.batch_size)
        self._books = Books(
            [part.config.name for part in mixture.parts],
            self._rows,
            skip_log,
            config.data.max_skip_fraction,
            "training met",
            start.data.get("accounting"),
        )
        self._plan = TrainPlan(mixture, config.train.batch_size, start.data.get("plan"))
        self._batches = batches(
            mixture,
            self._plan,
            range(start.step, config.train.steps),
            self._rows.held,
            MediaReader(
                pool, config.model.vision.image_size, config.data.frames, skip_log.lasting_failures
            ),
        )
        self._step_functions: dict[int, Any] = {}  # jitted, by index of their row shape
        self._unlogged: _StepResult | None = None
        self._metrics = MetricsWriter(run.path, start.step, config.train.tensorboard)
        chip = chip_of(spec.mesh.devices.flat[0])
        self._progress = Progress(
            start.step,
            config.train.steps,
            config.train.log_every,
            peak=chip.flops * spec.mesh.size if chip and chip.flops else None,
        )
        self._flops = [
            sum(part.model for part in train_work(config, shape).values())
            for shape in mixture.shapes
        ]
        asked = config.train.profiled_steps
        profiled = range(max(asked.start, start.step + 1), asked.stop)
        if asked and not profiled:
            self._progress.print(
                f"train.profile_steps={config.train.profile_steps}: nothing to profile after step {start.step}"
            )
        self._profile = StepProfile(
            run.path / "profile", profiled, self._log_last_step, self._progress.print
        )

    def run(self, state: TrainState) -> int | None:
        """Trains from the start step to the last one; returns the step if it is stopped before."""
        stop = StopRequest()
        with (
            stop.listening(),
            contextlib.closing(self._metrics),
            contextlib.closing(self._progress),
            contextlib.closing(self._profile),
        ):
            for step in range(self._start_step, self._config.steps + 1):
                if step > self._start_step:
                    results = self._evaluate(step, state)
                    self._checkpointer.poll()
                    stops = step < self._config.steps and stop.is_due(step)
                    self._save(step, state, results, is_due=stops)
                    if stops:
                        return step
                if step < self._config.steps:
                    with self._profile.step(step + 1):
                        batch = self._next_batch(step + 1)
                        state = self._step(step + 1, state, batch)
            self._books.exchange()
        print(self._books.table(), flush=True)
        return None

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Results of all evaluators if an evaluation is due, else nothing."""
        if not self._is_due(step, self._config.eval_every):
            return {}
        self._log_last_step()
        distributed.enter(f"evaluating step {step}")
        began = time.monotonic()
        results: dict[str, float] = {}
        try:
            with jax.set_mesh(self._spec.mesh):
                for evaluate in self._evaluators.values():
                    results.update(evaluate(state))
        except DataError:  # validation data is unreadable: keep what was trained
            self._checkpointer.save_now(step, state, self._data_state(step), {})
            raise
        if results:
            self._metrics.write(step, results)
            listed = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
            seconds = time.monotonic() - began
            self._progress.print(f"step {step:>6}  {listed}  ({duration(seconds)})")
        self._progress.skip_interval()
        return results

    def _save(
        self, step: int, state: TrainState, results: Mapping[str, float], is_due: bool
    ) -> None:
        """Saves a checkpoint if one is due, now or every `save_every` steps."""
        if is_due or self._is_due(step, self._config.save_every):
            distributed.enter(f"saving step {step}")
            self._log_last_step()
            is_last = is_due or step == self._config.steps
            save = self._checkpointer.save_now if is_last else self._checkpointer.save
            save(step, state, self._data_state(step), results)
            self._progress.skip_interval()

    def _is_due(self, step: int, every: int) -> bool:
        """Whether a step is a multiple of `every`, or the last one; 0 = never."""
        return bool(every) and (step % every == 0 or step == self._config.steps)

    def _next_batch(self, step: int) -> Batch:
        is_first = step == self._start_step + 1  # decode processes start
        limit = 0.0 if is_first else self._spec.config.data.frames.time_limit + _READ_MARGIN
        distributed.enter(f"reading the batch of step {step}", limit)
        batch = next(self._batches)
        distributed.enter(f"step {step}")
        self._books.add(batch.rows)
        # Several processes exchange only when something is logged or saved.
        if jax.process_count() == 1 or self._is_due(step, self._config.log_every):
            self._books.exchange()
        return batch

    def _step(self, step: int, state: TrainState, batch: Batch) -> TrainState:
        with jax.set_mesh(self._spec.mesh):
            step_function = self._step_function(batch.shape)
            state, metrics = step_function(state, place(batch.arrays, self._spec.mesh, self._rows))
        self._log_last_step()  # of the step before: the device is never waited for
        is_due = self._is_due(step, self._config.log_every)
        books = self._books.metrics() if is_due else {}
        self._unlogged = _StepResult(step, batch, metrics, books)
        return state

    def _step_function(self, index: int) -> Any:
        """The step for one row shape, which compiles when it is first called."""
        if index not in self._step_functions:
            shape = self._mixture.shapes[index]
            self._progress.print(f"compiling rows of {shape.tokens} tokens, {shape.frames} frames")
            self._progress.skip_interval()
            self._step_functions[index] = make_train_step(self._spec, shape)
        return self._step_functions[index]

    def _log_last_step(self) -> None:
        """Waits for the last step that is not yet logged, and logs it.

        Raises:
          NonFiniteLossError: if its loss or gradient norm is not finite.
        """
        if self._unlogged is None:
            return
        step, batch, metrics, books = self._unlogged
        self._unlogged = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
            part = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
            path = self._run.path / f"nonfinite_step_{step}{part}.npz"
            ids = np.array(batch.sample_ids)
            np.savez(path, allow_pickle=False, sample_ids=ids, **batch.arrays)
            distributed.barrier("nonfinite")  # all have this loss, and save their rows
            raise NonFiniteLossError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; samples "
                f"{', '.join(batch.sample_ids)}; the batch is saved in {path}"
            )
        shape = self._mixture.shapes[batch.shape]
        for name in ("tokens", "frames"):
            slots = self._rows.total * getattr(shape, name)
            values[f"{name.removesuffix('s')}_waste"] = 1 - values[name] / slots
        del values["frames"]
        values["compilations"] = sum(f._cache_size() for f in self._step_functions.values())
        values |= books
        self._metrics.write(step, values)
        self._progress.update(step, values, self._flops[batch.shape])

    def _data_state(self, step: int) -> dict[str, Any]:
        """The data position after `step` steps, as saved in the checkpoint."""
        self._plan.forget(step)
        self._books.exchange()
        return {
            "plan": self._plan.state(step),
            "sources": self._mixture.fingerprint(),
            "accounting": self._books.state(),
        }


def _check_same_data(mixture: Mixture) -> None:
    """Raises DataError if another process sees other data than process 0."""
    found = distributed.gather([socket.gethostname(), mixture.fingerprint()])
    (first_host, first), *others = found
    for host, fingerprint in others:
        if changed := [name for name in first if fingerprint[name] != first[name]]:
            raise DataError(
                f"data source {', '.join(changed)} on {host} is not the one on {first_host}: all processes "
                f"must read the same samples"
            )


def _print_summary(spec: StateSpec, mixture: Mixture, start_step: int) -> None:
    tokens, decoder = mixture.shapes[-1].tokens, spec.config.model.decoder
    if tokens > decoder.max_positions:
        logging.warning(
            "samples may be longer than the %d positions the decoder was trained for "
            "(model.decoder.max_positions): data.rows has %d tokens", decoder.max_positions, tokens
        )  # fmt: skip
    trained = sum(leaf.size for leaf in spec.shapes.trained.values())
    frozen = sum(leaf.size for leaf in spec.shapes.frozen.values())
    shapes = ", ".join(
        f"{shape.tokens} tokens and {shape.frames} frames" for shape in mixture.shapes
    )
    sources = ", ".join(f"{p.config.name} {len(p.usable):,}" for p in mixture.parts)
    print(
        f"{len(mixture):,} samples ({sources}; {len(mixture.skips)} unusable), rows of {shapes}\n"
        f"parameters: {trained:,} trained, {frozen:,} frozen; mesh {dict(spec.mesh.shape)}; "
        f"starting at step {start_step}",
        flush=True,
    )
    if spec.mesh.size > 1 and (whole := spec.replicated()):
        largest = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in whole[:_LARGEST])
        print(f"replicated on every device: {len(whole)} parameters; the largest: {largest}")
