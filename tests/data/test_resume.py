"""A process killed in the middle of an epoch resumes with the same rows, as one process or as two, with any
number of workers."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from storm_jax.config import to_dict

BATCH, STEPS, KILLED_AT = 4, 12, 5

# Reads steps of a mixture, and writes a digest of every row and the position after every step.
READER = """
import hashlib, json, os, pathlib, sys
import numpy as np
from storm_jax.config import RunConfig, from_dict
from storm_jax.text.tokenizer import load_tokenizer
from storm_jax.data.mixture import open_mixture
from storm_jax.data.pipeline import batches
from storm_jax.data.plan import TrainPlan
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool

config, tokenizer, out, state = (pathlib.Path(path) for path in sys.argv[1:5])
index, count, workers, batch, steps = map(int, sys.argv[5:])
config = from_dict(RunConfig, json.loads(config.read_text()))
saved = json.loads(state.read_text()) if state.exists() else {"step": 0, "plan": None}
with WorkerPool(workers) as pool, (out / f"rows_{index}_of_{count}.txt").open("a") as rows:
    mixture = open_mixture(config, config.data.train, load_tokenizer(tokenizer), pool)
    plan = TrainPlan(mixture, batch, saved["plan"])
    reader = MediaReader(pool, config.model.vision.image_size, config.data.frames)
    local = batch // count
    numbers = range(index * local, (index + 1) * local)
    todo = range(saved["step"], steps)
    for step, read in zip(todo, batches(mixture, plan, todo, numbers, reader)):
        for i, row in enumerate(numbers):
            parts = [read.arrays[name][i].tobytes() for name in sorted(read.arrays)]
            print(step, row, hashlib.sha256(b"".join(parts)).hexdigest(), file=rows, flush=True)
        if count == 1:
            new = {"step": step + 1, "plan": plan.state(step + 1)}
            state.with_suffix(".tmp").write_text(json.dumps(new))
            os.replace(state.with_suffix(".tmp"), state)
"""


@pytest.fixture
def start(small_config, shapes_folder: pathlib.Path, write_texts, tmp_path: pathlib.Path):
    texts = write_texts(tmp_path / "texts.jsonl", 50)
    sources = [
        {"name": "shapes", "path": str(shapes_folder / "train.json")},
        {"name": "texts", "path": str(texts), "repeat": 0.7},
    ]
    rows = [{"tokens": 128, "frames": 4}, {"tokens": 128, "frames": 16}]
    drawn = [{"temporal_pool": 2}, {"temporal_pool": 4, "spatial_pool": 2, "temporal_sample": 2}]
    config = small_config(data__train=sources, data__rows=rows, train__compressions=drawn)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))

    def run(out: str, index: int = 0, count: int = 1, workers: int = 2) -> subprocess.Popen:
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        arguments = [
            tmp_path / "config.json",
            shapes_folder / "tokenizer",
            folder,
            folder / "state.json",
        ]
        numbers = [index, count, workers, BATCH, STEPS]
        root = str(pathlib.Path(__file__).parents[2])
        return subprocess.Popen(
            [sys.executable, "-c", READER, *map(str, arguments), *map(str, numbers)],
            env={**os.environ, "PYTHONPATH": root},
        )

    return run


def digests(folder: pathlib.Path) -> dict[tuple[int, int], set[str]]:
    """Digests by (step, row): a set, since a row may have been read twice."""
    found: dict[tuple[int, int], set[str]] = {}
    for path in folder.glob("rows_*.txt"):
        for line in path.read_text().splitlines():
            step, row, digest = line.split()
            found.setdefault((int(step), int(row)), set()).add(digest)
    return found


def test_rows_after_a_kill_are_those_of_an_uninterrupted_run(start, tmp_path: pathlib.Path):
    whole, killed = start("whole", workers=0), start("killed")
    state = tmp_path / "killed/state.json"
    deadline = time.monotonic() + 120
    while not (state.exists() and json.loads(state.read_text())["step"] >= KILLED_AT):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert whole.wait() == 0
    reached = json.loads(state.read_text())["step"]
    assert reached < STEPS
    halves = [start("killed", index, 2, workers) for index, workers in ((0, 1), (1, 0))]
    assert [process.wait() for process in halves] == [0, 0]
    want, got = digests(tmp_path / "whole"), digests(tmp_path / "killed")
    assert set(want) == {(step, row) for step in range(STEPS) for row in range(BATCH)}
    assert got == want
    assert all(len(same) == 1 for same in got.values())
