"""Trains a STORM, or resumes the run in --workdir.

    python train.py --config=configs/tiny.py:stage=align --workdir=runs/align
    python train.py --config=configs/tiny.py:stage=sft --workdir=runs/sft --config.init_from=runs/align

Every field of the configuration can be overridden: --config.optim.learning_rate.projector=3e-4
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from storm_jax import command_line, distributed
from storm_jax.config import ConfigError, RunConfig, from_dict
from storm_jax.data.mixture import open_mixture
from storm_jax.data.skips import DataError
from storm_jax.files import system_error
from storm_jax.media.workers import WorkerPool
from storm_jax.run import Run, RunError
from storm_jax.sharding import make_mesh
from storm_jax.text.tokenizer import tokenizer_folder
from storm_jax.train.initialisation import inherit_model
from storm_jax.train.loop import NonFiniteLossError, train
from storm_jax.train.metrics import plot_curves
from storm_jax.train.state import StateSpec
from storm_jax.train.stop import STOPPED
from storm_jax.train.validation import Evaluator, make_validation

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file with its stage, configs/NAME.py:stage=align|sft|long."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; a run in it is resumed.", required=True)
flags.mark_flag_as_required("config")
command_line.define_process_flags()


def with_inherited_model(config: RunConfig, run: Run) -> RunConfig:
    """Returns `config` with the tower and decoder of the run to resume, or of `init_from`."""
    source = run if run.has_begun else Run(config.init_from)
    explicit = config_flags.get_override_values(flags.FLAGS["config"])
    config, changes = inherit_model(config, source, explicit)
    for name, (before, after) in changes.items():
        print(f"{name}={after!r} of {source.path} replaces {before!r}")
    return config


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = from_dict(RunConfig, CONFIG.value)
    if not config.data.train:
        raise ConfigError("data.train is empty: list the sources to train on")
    run = Run(WORKDIR.value)
    _drop_tracebacks_of_failed_writes()
    with distributed.processes(**command_line.process_flags()), contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(run.locked())
            if config.init_from:
                config = with_inherited_model(config, run)
            run.prepare(config, run.tokenizer_path if run.has_begun else tokenizer_folder(config))
        else:
            stack.enter_context(distributed.silence())
        run.share()
        make = functools.partial(make_evaluators, run)
        stopped_at = train(run, make_mesh(run.config.mesh), make)
        if distributed.is_main():
            print(f"training curves: {plot_curves(run.path)}")
    if stopped_at is not None:
        if distributed.is_main():
            message = f"stopped on request after step {stopped_at}, which is saved"
            print(f"train.py: {message}; the same command resumes", file=sys.stderr)
        sys.exit(STOPPED)


def _drop_tracebacks_of_failed_writes() -> None:
    """Orbax, asyncio and TensorStore log hundreds of lines about a file that cannot be written; we say it in one."""
    logging.get_absl_handler().addFilter(
        lambda record: not system_error(record.exc_info[1] if record.exc_info else None)
    )
    default = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            default(unraisable)

    sys.unraisablehook = hook


def make_evaluators(run: Run, spec: StateSpec, pool: WorkerPool) -> dict[str, Evaluator]:
    config = run.config
    if not config.data.val or not config.train.eval_every:
        return {}
    with distributed.main_first("validation data"):
        mixture = open_mixture(config, config.data.val, run.tokenizer(), pool, config.unsampled)
    return {"validation": make_validation(run, spec, mixture, pool)}


if __name__ == "__main__":
    command_line.run(
        main, (DataError, RunError, NonFiniteLossError, distributed.ProcessError, ImportError)
    )
