"""Kills processes of a training at random moments, and compares its losses with an undisturbed one's.

    python -m tests.chaos --kills=20 --workers=10 --seed=0

Two trainings are disturbed. Of one, which has several processes, one process at a time is killed, some of them
inside a save: the others must end by themselves, and all are started again with the same command. Of the other,
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
from storm_jax.run import Run
from tests.forked import ROOT
from tests.processes import LIMIT, Launch, last_step, metrics
from tests.small_model import SMALL

_MINUTE = 60.0  # in which the others notice that a process has died


class Training:
    """train.py with two workers per process and a checkpoint every 5 steps, in a folder of its own.

    Args:
      processes: started together; one process has as many devices as all of them.
    """

    def __init__(
        self, data: pathlib.Path, workdir: pathlib.Path, steps: int, processes: int, devices: int
    ):
        self.workdir, self._processes, self._devices = workdir, processes, devices
        fields = {
            **SMALL, "compression.num_frames": 8, "compression.temporal_pool": 2,
            "data.train[0].path": data / "train.json", "data.num_workers": 2,
            "data.rows[0].tokens": 128, "data.rows[0].frames": 16,
            "train.steps": steps, "train.batch_size": 8, "train.eval_every": 0,
            "train.save_every": 5, "train.log_every": 1,
        }  # fmt: skip
        self._arguments = [
            "--config=configs/tiny.py:stage=sft",
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]

    def start(self) -> Launch:
        return Launch(
            self.workdir, self._arguments, processes=self._processes, devices=self._devices
        )

    def finish(self) -> None:
        if any(statuses := self.start().wait()):
            sys.exit(f"training ended with {statuses}: see {self.workdir}.*.log")

    def saved(self) -> int:
        """The step that a new start resumes from."""
        return max(Run(self.workdir).checkpoints.steps(), default=0)

    def counts(self) -> dict[str, float]:
        """The books of the last step."""
        last = metrics(self.workdir)[last_step(self.workdir)]
        return {k: v for k, v in last.items() if k.startswith("data/")}

    def wait_for_save(self, launch: Launch) -> None:
        """Waits until a checkpoint is being written."""
        folder, deadline = self.workdir / "checkpoints", time.monotonic() + LIMIT
        while not any(folder.glob("*.orbax-checkpoint-tmp")) and time.monotonic() < deadline:
            if any(process.poll() is not None for process in launch.processes):
                return
            time.sleep(0.001)


def kill_processes(training: Training, kills: int, rng: random.Random) -> tuple[int, int, int]:
    """Kills a process while it starts, trains or saves, and finishes the training.

    Returns:
      The number of kills, of those inside a save, and of the steps that were taken again.
    """
    done = inside = lost = 0
    while done < kills:
        launch, moment = training.start(), rng.random()
        if moment < 0.2:  # while it starts
            time.sleep(rng.uniform(0, 8))
        elif not launch.wait_for(last_step(training.workdir) + rng.randrange(1, 10)):
            break
        if moment > 0.6:
            training.wait_for_save(launch)
        else:
            time.sleep(rng.uniform(0, 0.3))
        victim = rng.choice(launch.processes)
        if victim.poll() is None:
            victim.kill()
            done += 1
            inside += any((training.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        others = [process for process in launch.processes if process is not victim]
        if not all(process.wait(_MINUTE) for process in others):
            break  # the training had ended
        lost += last_step(training.workdir) - training.saved()
    training.finish()
    return done, inside, lost


def kill_workers(training: Training, kills: int, rng: random.Random) -> int:
    """Kills workers of a running training one by one. Returns the number of kills."""
    launch, done = training.start(), 0
    while done < kills and launch.wait_for(last_step(training.workdir) + rng.randrange(1, 5)):
        time.sleep(rng.uniform(0, 0.3))
        if workers := _children(launch.processes[0]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                done += 1
    if any(statuses := launch.wait()):
        sys.exit(f"training ended with {statuses}: see {training.workdir}.*.log")
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
    found, wanted = metrics(training.workdir), metrics(expected.workdir)
    return [
        step
        for step in sorted({*found, *wanted})
        if found.get(step, {}).get("loss") != wanted.get(step, {}).get("loss")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=20, help="of one process of a training")
    parser.add_argument("--processes", type=int, default=2, help="of that training")
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
    count = args.processes
    whole, robbed = (
        Training(root / "data", root / name, steps, 1, count) for name in ("whole", "robbed")
    )
    killed = Training(root / "data", root / "killed", steps, count, 1)
    whole.finish()
    kills, inside, lost = kill_processes(killed, args.kills, rng)
    workers = kill_workers(robbed, args.workers, rng)
    differing = 0
    what_killed = (
        f"{kills} kills of one of {count} processes, {inside} inside a save, {lost} lost steps"
    )
    for training, what in ((killed, what_killed), (robbed, f"{workers} kills of workers")):
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
