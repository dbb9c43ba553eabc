"""Everything that is worth measuring on an accelerator, in order of value and within a time limit.

    python -m benchmarks.accelerator --out=runs/accelerator --minutes=9
    python -m benchmarks.accelerator --out=runs/rehearsal --rehearse            every part, tiny, on CPU

Each part is a separate program: one that fails, or lacks a package, does not stop the next. The last one is stopped
at the limit; what it has written stays. Writes OUT/PART/, OUT/PART.log and OUT/parts.json, and prints a line for each
part and then the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from storm_jax.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Part:
    """A program, run as `python -m MODULE --out=OUT/NAME ARGUMENTS`.

    Attributes:
      rehearsal: arguments with `--rehearse`.
      needs: packages without which it is left out.
    """

    name: str
    module: str
    arguments: Sequence[str] = ()
    rehearsal: Sequence[str] = ()
    needs: Sequence[str] = ()


LATENCY = ("torch", "transformers", "ml_collections")
PARTS = (
    Part("kernels", "benchmarks.kernels", rehearsal=("--length=40",)),
    Part(
        "scan",
        "benchmarks.scan",
        ("--problems", "1x4096x2304x16", "1x32768x2304x16", "--rounds=3"),
        ("--problems", "1x64x32x4", "--rounds=1"),
        ("torch", "transformers", "matplotlib"),
    ),
    Part(
        "latency_7b",
        "benchmarks.latency",
        ("--preset=storm_qwen2_7b", "--frames=32,128", "--rounds=3", "--torch-compile"),
        ("--frames=8", "--compress=8x", "--rounds=1", "--torch-compile"),
        LATENCY,
    ),
    Part(
        "training",
        "benchmarks.training",
        ("--preset=storm_qwen2_1_5b", "--frames=32", "--compress=4x,1x", "--rounds=3"),
        ("--frames=8", "--compress=4x", "--rounds=1"),
        LATENCY,
    ),
    Part(
        "latency_7b_long",
        "benchmarks.latency",
        ("--preset=storm_qwen2_7b", "--frames=512", "--compress=8x,4x", "--rounds=2", "--no-torch"),
        ("--frames=16", "--compress=8x", "--rounds=1", "--no-torch"),
        LATENCY,
    ),
    Part(
        "tiny",
        "benchmarks.tiny",
        rehearsal=("--steps=6", "--clips=64"),
        needs=("grain", "array_record", "ml_collections", "av"),
    ),
)


def run(part: Part, out: pathlib.Path, rehearses: bool, limit: float) -> dict[str, Any]:
    """Runs a part for at most `limit` seconds; returns how it ended."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"part": part.name, "ended": f"left out: no {', '.join(missing)}"}
    arguments = part.rehearsal if rehearses else part.arguments
    command = [sys.executable, "-m", part.module, f"--out={out / part.name}", *arguments]
    # torch needs some of a GPU's memory, which JAX would take at its start.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if rehearses:
        environment["JAX_PLATFORMS"] = "cpu"
    began = time.monotonic()
    with (
        (out / f"{part.name}.log").open("w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = "stopped at the time limit"
        else:
            ended = "done" if code == 0 else f"failed with {code}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the programs that it started
    return {"part": part.name, "ended": ended, "seconds": round(time.monotonic() - began, 1)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9, help="limit of all parts together")
    parser.add_argument("--rehearse", action="store_true", help="every part, tiny, on CPU")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    found: list[dict[str, Any]] = []
    for part in PARTS:
        left = end - time.monotonic()
        result = {"part": part.name, "ended": "left out: no time left"}
        if left > 0:
            print(f"{part.name} ...", flush=True)
            result = run(part, args.out, args.rehearse, left)
        found.append(result)
        print(f"{result['part']}: {result['ended']}, {result.get('seconds', 0)} s", flush=True)
        write_atomically(args.out / "parts.json", json.dumps(found, indent=1) + "\n")
    for result in found:
        log = args.out / f"{result['part']}.log"
        if log.exists():
            lines = log.read_text().splitlines()[-30:]
            print(f"\n{result['part']}: {result['ended']}", *lines, sep="\n")
    if any(result["ended"].startswith("failed") for result in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
