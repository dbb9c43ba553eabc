"""Kills a training and its workers at random moments, and compares its losses with an undisturbed one's.

    python -m tests.chaos --kills=20 --workers=10 --seed=0

Two trainings are disturbed. One is killed as a whole and started again with the same command; of the other,
single decode workers are killed. Every step must have the loss, and every source the counts, that it has
without. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from storm_jax.files import read_lines
from tests.forked import ROOT
from tests.small_model import SMALL

_LIMIT = 600.0  # seconds without a step


class Training:
    """train.py with two workers and a checkpoint every 5 steps, in a folder of its own."""

    def __init__(self, data: pathlib.Path, workdir: pathlib.Path, steps: int):
        self.workdir, self._steps = workdir, steps
        fields = {
            **SMALL, "compression.num_frames": 8, "compression.temporal_pool": 2,
            "data.train[0].path": data / "train.json", "data.num_workers": 2,
            "train.steps": steps, "train.batch_size": 8, "train.eval_every": 0,
            "train.save_every": 5, "train.log_every": 1,
        }  # fmt: skip
        self._command = [
            sys.executable, "train.py", "--config=configs/tiny.py:stage=sft", f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]  # fmt: skip

    def start(self) -> subprocess.Popen:
        with (self.workdir.parent / f"{self.workdir.name}.log").open("a") as log:
            return subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)

    def finish(self) -> None:
        if status := self.start().wait():
            sys.exit(f"training ended with {status}: see {self.workdir}.log")

    def step(self) -> int:
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        path = self.workdir / "metrics.jsonl"
        lines = read_lines(path) if path.exists() else []
        return {line["step"]: line["loss"] for line in lines}

    def counts(self) -> dict[str, float]:
        """The books of the last step, without times."""
        last = read_lines(self.workdir / "metrics.jsonl")[-1]
        return {k: v for k, v in last.items() if k.startswith("data/") and "seconds" not in k}

    def wait_for(self, process: subprocess.Popen, step: int) -> bool:
        """Waits until a step is logged. False if the training ended first."""
        deadline = time.monotonic() + _LIMIT
        while self.step() < step:
            if process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                process.kill()
                sys.exit(f"no step in {_LIMIT:.0f} s: see {self.workdir}.log")
            time.sleep(0.02)
        return True


def kill_trainings(training: Training, kills: int, rng: random.Random) -> int:
    """Kills the training while it starts, trains or saves, and finishes it. Returns the number of kills."""
    done = 0
    while done < kills:
        process = training.start()
        if rng.random() < 0.2:  # while it starts
            time.sleep(rng.uniform(0, 8))
        elif not training.wait_for(process, training.step() + rng.randrange(1, 10)):
            break
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.kill()
            done += 1
        process.wait()
    training.finish()
    return done


def kill_workers(training: Training, kills: int, rng: random.Random) -> int:
    """Kills workers of a running training one by one. Returns the number of kills."""
    process, done = training.start(), 0
    while done < kills and training.wait_for(process, training.step() + rng.randrange(1, 5)):
        time.sleep(rng.uniform(0, 0.3))
        if workers := _children(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                done += 1
    if status := process.wait():
        sys.exit(f"training ended with {status}: see {training.workdir}.log")
    return done


def _children(process: subprocess.Popen) -> list[int]:
    """Process ids of the decode workers."""
    found = []
    for task in pathlib.Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for pid in task.read_text().split():
                if b"storm_jax.media.workers" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found


def differing_steps(training: Training, expected: Training) -> list[int]:
    """Steps with another loss than expected, or none."""
    found, wanted = training.losses(), expected.losses()
    return [step for step in sorted({*found, *wanted}) if found.get(step) != wanted.get(step)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=20, help="of the training process")
    parser.add_argument("--workers", type=int, default=10, help="kills of decode workers")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    root = pathlib.Path(tempfile.mkdtemp(prefix="storm-chaos-"))
    subprocess.run(
        [sys.executable, "-m", "storm_jax.tasks.shapes", f"--out={root}/data", "--clips=400",
         f"--seed={args.seed}", "--frames=8"], cwd=ROOT, check=True,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "storm_jax.data.tokenizer", f"--data={root}/data/train.json",
         f"--out={root}/data/tokenizer"], cwd=ROOT, check=True,
    )  # fmt: skip
    steps = 20 + max(8 * args.kills, 6 * args.workers)
    whole, killed, robbed = (
        Training(root / "data", root / name, steps) for name in ("whole", "killed", "robbed")
    )
    whole.finish()
    kills = kill_trainings(killed, args.kills, rng)
    workers = kill_workers(robbed, args.workers, rng)
    differing = 0
    for training, what in ((killed, f"{kills} kills"), (robbed, f"{workers} kills of workers")):
        steps_differ = differing_steps(training, whole)
        same = "the same" if training.counts() == whole.counts() else "OTHER"
        skipped = training.workdir / "skipped.jsonl"
        skips = len(read_lines(skipped)) if skipped.exists() else 0
        print(
            f"{what}: {len(steps_differ)} of {steps} losses differ, "
            f"{same} counts of samples, {skips} samples skipped"
        )
        differing += len(steps_differ) + (same != "the same") + skips
    if differing or (kills, workers) != (args.kills, args.workers):
        sys.exit(f"see {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
