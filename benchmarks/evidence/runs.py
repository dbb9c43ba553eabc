"""Trains and tests one row with one seed. A training that was interrupted resumes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.evidence.rows import BUDGETS, CLIPS, EVAL_CLIPS, FAMILIES, Row, compression
from storm_jax import evals
from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig, to_dict
from storm_jax.evals.benchmark import ScoredReply
from storm_jax.files import write_atomically
from storm_jax.inference.predictor import Predictor
from storm_jax.tasks import shapes

_CONFIG = """\"\"\"Written by benchmarks.evidence.\"\"\"

import json

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(json.loads({text!r}))
"""


def render(out: pathlib.Path, clips: int = CLIPS) -> pathlib.Path:
    """Renders the task and trains its tokenizer, unless that has been done; returns the folder."""
    data = out / "data"
    command = ["storm_jax.tasks.shapes", f"--out={data}", f"--clips={clips}", "--seed=0"]
    _call("-m", *command, f"--families={','.join(FAMILIES)}", f"--eval_clips={EVAL_CLIPS}")
    if not (data / "tokenizer").exists():
        tokenizer = ["storm_jax.data.tokenizer", f"--data={data}/train.json"]
        _call("-m", *tokenizer, f"--out={data}/tokenizer")
    return data


def train(row: Row, data: pathlib.Path, workdir: pathlib.Path, seed: int, steps: int) -> float:
    """Trains one run, or what is left of it; returns the seconds of all attempts."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir.with_suffix(".py")
    config = json.dumps(to_dict(row.config(str(data.absolute()), seed, steps)))
    write_atomically(path, _CONFIG.format(text=config))
    clock = workdir.with_suffix(".seconds")
    spent, began = float(clock.read_text()) if clock.exists() else 0.0, time.monotonic()
    try:
        _call("train.py", f"--config={path}", f"--workdir={workdir}")
    finally:
        spent += time.monotonic() - began
        write_atomically(clock, f"{spent:.1f}\n")
    return spent


def test(
    row: Row, data: pathlib.Path, workdir: pathlib.Path, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields a record for each compression that a row is tested with."""
    predictor = Predictor(workdir)
    settings = shapes.read_settings(data)
    for budget in row.tests:
        tested = dataclasses.replace(compression(budget), num_frames=settings.frames)
        factors: dict[str, Any] = BUDGETS[budget].factors
        options = {"data_root": data, "num_frames": settings.frames, **factors}
        report = evals.evaluate(predictor, "shapes", **options)
        assert report is not None
        replies = report.replies
        yield {
            "row": row.name,
            "seed": seed,
            "budget": budget,
            **factors,
            "visual_tokens": plan_clip(
                tested.num_frames, Grid.of(predictor.config.model), tested
            ).num_tokens,
            "right": {family: _count(_of(replies, family)) for family in FAMILIES},
            "inside a group": {
                family: _count(_inside(_of(replies, family), settings, tested))
                for family in ("order", "motion")
            },
        }


def _of(replies: Sequence[ScoredReply], family: str) -> list[ScoredReply]:
    return [reply for reply in replies if reply.question.groups["family"] == family]


def _count(replies: Sequence[ScoredReply]) -> list[int]:
    """How many are right, of how many."""
    return [sum(reply.right for reply in replies), len(replies)]


def _inside(
    replies: Sequence[ScoredReply], settings: shapes.Settings, tested: CompressionConfig
) -> list[ScoredReply]:
    """Those about an event whose frames are averaged into one group, which is not dropped: without mixing, the best
    guess is one of two."""
    if tested.temporal_pool == 1:
        return []
    plan = plan_clip(tested.num_frames, Grid.square(1), tested)
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
