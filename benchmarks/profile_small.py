"""Where the time of a training step and of an answer goes, by part of the model.

    python -m benchmarks.profile_small --out=runs/profile       storm_small, 32 frames, 4x, on 2 CPU cores

Runs the programs of `benchmarks.training` and `benchmarks.latency` once, traces the second time, and prints and writes
what `benchmarks.profile` finds. Writes OUT/profile.json and the traces.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import jax

from benchmarks import profile
from benchmarks.latency import OurPrograms, Prompt
from benchmarks.machine import machine
from benchmarks.models import COMPRESSIONS, PRESETS, random_params
from benchmarks.timing import Call
from benchmarks.training import Row, our_step, run_config
from storm_jax.files import write_atomically

PRESET, FRAMES, COMPRESSION = "storm_small", 32, "4x"


def training_step() -> Call:
    model = PRESETS[PRESET]
    row = Row(model, FRAMES, COMPRESSIONS[COMPRESSION])
    return our_step(run_config(model, row, remat=True), row)[0]


def answer() -> Call:
    """The first token and the 32 after it."""
    model = PRESETS[PRESET]
    prompt = Prompt(model, FRAMES, COMPRESSIONS[COMPRESSION])
    calls, _ = OurPrograms(model, random_params(model)).calls({COMPRESSION: prompt})
    parts = (("vision", ""), ("projector", COMPRESSION), ("answer", COMPRESSION))

    def call() -> None:
        for part, compression in parts:
            calls["storm", part, compression]()

    return call


def traced(call: Call, folder: pathlib.Path) -> dict[str, Any]:
    call()
    began = time.perf_counter()
    call()
    untraced = time.perf_counter() - began
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        call()
    return {"untraced_seconds": untraced, **profile.summary(profile.newest_trace(folder))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {
        "preset": PRESET,
        "frames": FRAMES,
        "compression": COMPRESSION,
        "machine": machine(),
    }
    for name, make in (("training step", training_step), ("answer", answer)):
        results[name] = traced(make(), args.out / name.replace(" ", "_"))
        print(
            f"{name}, {results[name]['untraced_seconds']:.2f} s without the trace: {profile.table(results[name])}\n",
            flush=True,
        )
    write_atomically(args.out / "profile.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
