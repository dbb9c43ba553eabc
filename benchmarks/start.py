"""Seconds from the start of a process to the first answer about a video, by part, cold and warm.

    python -m benchmarks.start --workdir=runs/sft --video=clip.mp4 --out=runs/start

Does what predict.py does: imports, loads the checkpoint, reads and encodes the video, answers. *Cold* compiles every
program; *warm* finds them where an earlier process kept them. Each round runs both, in separate processes. Writes
OUT/start.json and prints medians and the range of the total.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from benchmarks.machine import machine
from storm_jax.files import write_atomically

# Runs in a separate process, whose start it is given; prints seconds by part.
_ANSWER = """
import json, sys, time
began, workdir, video = float(sys.argv[1]), *sys.argv[2:4]
marks = [("python", time.time())]
from storm_jax import command_line
from storm_jax.inference.predictor import Predictor
command_line.keep_compiled_programs()
marks.append(("imports", time.time()))
predictor = Predictor(workdir)
marks.append(("load", time.time()))
watched = predictor.watch(video)
marks.append(("read and encode", time.time()))
watched.answer("What happens?")
marks.append(("answer", time.time()))
times = [began, *(when for _, when in marks)]
print(json.dumps({name: end - start for (name, end), start in zip(marks, times)}))
"""


PARTS = ("python", "imports", "load", "read and encode", "answer")


def measure(workdir: pathlib.Path, video: pathlib.Path, cache: str) -> dict[str, float]:
    """Seconds by part, with compiled programs in the folder `cache`."""
    command = [sys.executable, "-c", _ANSWER, str(time.time()), str(workdir), str(video)]
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Medians by part, and the range of the total."""
    lines = ["      " + "".join(f"{part:>17}" for part in (*PARTS, "total"))]
    for name, found in rounds.items():
        totals = [sum(each.values()) for each in found]
        middle = [statistics.median(each[part] for each in found) for part in PARTS]
        cells = [*middle, statistics.median(totals)]
        spread = f"   ({min(totals):.2f} to {max(totals):.2f})"
        lines.append(f"{name:<6}" + "".join(f"{value:>17.2f}" for value in cells) + spread)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of a run")
    parser.add_argument("--video", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for found in rounds.values():
                found.append(measure(args.workdir, args.video, cache))
    results = {"machine": machine(), "seconds": rounds}
    write_atomically(args.out / "start.json", json.dumps(results, indent=1) + "\n")
    print(table(rounds))


if __name__ == "__main__":
    main()
