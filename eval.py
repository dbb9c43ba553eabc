"""Evaluates a run on a benchmark; its compression may differ from training, weights stay the same.

    python eval.py --workdir=runs/sft --benchmark=shapes
    python eval.py --workdir=runs/sft --benchmark=shapes --temporal_pool=4 --temporal_sample=2

The report goes to RUN/evals/BENCHMARK/SETTINGS/: predictions, results and a contact sheet.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from storm_jax.config import CompressionConfig
from storm_jax.evals import shapes
from storm_jax.evals.runner import Report, evaluate, settings_name
from storm_jax.inference.predictor import Predictor
from storm_jax.run import RunError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run that train.py wrote.", required=True
)
BENCHMARK = flags.DEFINE_enum("benchmark", None, ["shapes"], "What to evaluate on.", required=True)
DATA = flags.DEFINE_string(
    "data",
    None,
    "Folder of the benchmark's files; the folder of the run's training data by default.",
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; the last one by default.")
LIMIT = flags.DEFINE_integer("limit", None, "Ask the first questions only.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Questions answered together.", lower_bound=1)
COMPRESSION = {
    "num_frames": "Frames taken from a video",
    "temporal_pool": "Frames whose tokens are averaged",
    "spatial_pool": "Edge of the token cells that are averaged",
    "temporal_sample": "Every which group of frames is kept",
}
for _name, _help in COMPRESSION.items():
    flags.DEFINE_integer(_name, None, f"{_help}; as in training by default.", lower_bound=1)
REQUIRE = flags.DEFINE_list(
    "require",
    [],
    "Groups whose 95 % lower bound must be 10 points above chance; else the exit status is 1.",
)
MARGIN = 0.1


def chosen_compression(trained: CompressionConfig) -> CompressionConfig:
    """What the flags say, and what training used where they say nothing."""
    values = {name: flags.FLAGS[name].value or getattr(trained, name) for name in COMPRESSION}
    return CompressionConfig(**values)


def unproven(report: Report, required: Sequence[str]) -> list[str]:
    """The required groups that are not clearly above chance."""
    proven = {group.group for group in report.groups if group.low >= group.chance + MARGIN}
    return [name for name in required if name not in proven]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    try:
        predictor = Predictor(WORKDIR.value, STEP.value)
        data = DATA.value or pathlib.Path(predictor.config.data.train[0].path).parent
        benchmark = shapes.load(data)
        compression = chosen_compression(predictor.compression)
        folder = pathlib.Path(WORKDIR.value, "evals", benchmark.name)
        folder /= settings_name(compression, predictor.step, LIMIT.value)
        report = evaluate(
            predictor,
            benchmark,
            compression,
            folder,
            limit=LIMIT.value,
            batch_size=BATCH_SIZE.value,
        )
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    print(report.table())
    failed = sum(group.failed for group in report.groups)
    if failed:
        print(
            f"{failed} questions had unreadable media and count as wrong: {folder}/predictions.jsonl"
        )
    print(f"results: {folder}/results.json\ncontact sheet: {folder}/contact_sheet.png")
    missed = unproven(report, REQUIRE.value)
    if missed:
        sys.exit(f"eval.py: not {MARGIN:.0%} above chance: {', '.join(missed)}")


if __name__ == "__main__":
    app.run(main)
