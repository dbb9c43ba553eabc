"""Hours of video in a stream: time for each frame, memory and programs must not grow.

    python -m benchmarks.stream --workdir=RUN --hours=10 --policy=merge --out=runs/stream

Pushes random frames, as many as `--fps` makes of so many hours, one by one and as fast as they are encoded, and asks a
question after each tenth of them. RUN needs model.mamba.direction="forward", or else it encodes a window again.
Writes OUT/stream.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.data import resident
from benchmarks.machine import machine
from storm_jax.config import STREAM_POLICIES
from storm_jax.evals.report.text import markdown
from storm_jax.files import write_atomically
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor

QUESTION = "Which flash came first?"
PARTS = 10


def measure(storm: Predictor, frames: int, fps: float, budget: int, policy: str) -> list[dict]:
    """One row of the table for each tenth of the frames."""
    stream = storm.stream(fps=fps, budget_tokens=budget, policy=policy)
    size, rng = storm.config.model.vision.image_size, np.random.default_rng(0)
    clip = rng.integers(0, 256, (64, size, size, 3)).astype(np.uint8)
    sampling = Sampling(max_new_tokens=16)
    rows, seconds = [], []
    for number in range(frames):
        began = time.perf_counter()
        stream.push(clip[number % len(clip)], number / fps)
        seconds.append(time.perf_counter() - began)
        if (number + 1) % max(1, frames // PARTS):
            continue
        began = time.perf_counter()
        first = next(stream.ask(QUESTION, sampling=sampling), "")
        asked = time.perf_counter() - began
        stats = stream.stats
        rows.append(
            {
                "hours": stats.seconds / 3600,
                "frames": stats.used,
                "push_seconds": statistics.median(seconds),
                "first_token_seconds": asked,
                "answered": bool(first),
                "visual_tokens": stats.visual_tokens,
                "lost": stats.lost,
                "stream_bytes": stats.device_bytes,
                "device_bytes": sum(array.nbytes for array in jax.live_arrays()),
                "resident_megabytes": resident(),
                "programs": storm.num_programs,
            }
        )
        seconds = []
        print(f"{stats.used:,} of {frames:,} frames", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = [
        "hours", "frames", "ms a frame", "ms to the first token", "visual tokens", "groups lost", "stream, kB",
        "all on the device, MB", "process, MB", "programs",
    ]  # fmt: skip
    cells = [
        [
            f"{row['hours']:.1f}", f"{row['frames']:,}", f"{1e3 * row['push_seconds']:.2f}",
            f"{1e3 * row['first_token_seconds']:.0f}", f"{row['visual_tokens']:,}", f"{row['lost']:,}",
            f"{row['stream_bytes'] / 1e3:,.0f}", f"{row['device_bytes'] / 1e6:.2f}",
            f"{row['resident_megabytes']:.0f}", str(row["programs"]),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown([head, *cells])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="run with a checkpoint")
    parser.add_argument("--hours", type=float, default=10, help="of video; default 10")
    parser.add_argument("--fps", type=float, default=1, help="frames a second; default 1")
    parser.add_argument("--budget_tokens", type=int, default=1024, help="default 1024")
    parser.add_argument("--policy", choices=STREAM_POLICIES, default="merge")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    storm = Predictor(args.workdir)
    frames = round(args.hours * 3600 * args.fps)
    rows = measure(storm, frames, args.fps, args.budget_tokens, args.policy)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine(),
        "policy": args.policy,
        "budget": args.budget_tokens,
        "rows": rows,
    }
    write_atomically(args.out / "stream.json", json.dumps(results, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
