"""Trains `configs/tiny.py` for a few steps on the built-in task, from files to falling loss.

    python -m benchmarks.tiny --out=runs/tiny

Renders clips and a tokenizer, runs train.py, and fails if the loss of the last steps is not below that of the first one.
Writes OUT/shapes and the run OUT/run.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import statistics
import subprocess
import sys

from storm_jax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
LAST = 5  # steps that the last loss is the mean of


def run(*arguments: str) -> None:
    """Runs Python in the root of the repository; ends if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--clips", type=int, default=400, help="training samples")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    data, workdir = args.out.absolute() / "shapes", args.out.absolute() / "run"
    shutil.rmtree(workdir, ignore_errors=True)  # it would be resumed
    records = data / "train.json"
    run(
        *("-m", "storm_jax.tasks.shapes", f"--out={data}"),
        *(f"--clips={args.clips}", "--eval_clips=1"),
    )
    run("-m", "storm_jax.data.tokenizer", f"--data={records}", f"--out={data / 'tokenizer'}")
    run(
        *("train.py", "--config=configs/tiny.py:stage=sft", f"--workdir={workdir}"),
        f"--config.data.train[0].path={records}",
        f"--config.train.steps={args.steps}",
        "--config.train.eval_every=0",
    )
    losses = [line["loss"] for line in read_metrics(workdir) if "loss" in line]
    last = statistics.mean(losses[-LAST:])
    print(f"{len(losses)} steps: loss {losses[0]:.3f} at the first, {last:.3f} in the last {LAST}")
    if len(losses) < args.steps or not last < losses[0]:
        sys.exit("the loss did not fall")


if __name__ == "__main__":
    main()
