"""The paper's claims in miniature, with seeds: trains and tests the rows of docs/results.md.

    python -m benchmarks.evidence --out=runs/evidence
    python -m benchmarks.evidence --out=runs/evidence --seeds=0 "--rows=storm;mlp"

OUT/results.json has a record for each row, seed and compression; what has one is not run again, and a training that was
interrupted resumes. OUT/results.md and OUT/budgets.png show them. `--results` continues another file of records.

`--latency` also times the runs of the first seed from frames to the first token, and draws OUT/accuracy_latency.png.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence import latency, report, runs
from benchmarks.evidence.rows import BUDGETS, STEPS, TABLES, Row
from benchmarks.machine import machine
from storm_jax.files import write_atomically
from storm_jax.tasks import shapes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--rows", default="", help="separated by semicolons; default all")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a training; default {STEPS}")
    parser.add_argument("--results", type=pathlib.Path, help="default OUT/results.json")
    parser.add_argument("--latency", action="store_true", help="time the runs of the first seed")
    args = parser.parse_args(arguments)
    path = args.results or args.out / "results.json"
    known = {row.name: row for table in TABLES.values() for row in table}
    wanted = args.rows.split(";") if args.rows else list(known)
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--rows: {unknown[0]!r} is not one of {'; '.join(known)}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    data = runs.render(args.out)
    settings = shapes.read_settings(data)
    for seed in seeds:
        for row in (known[name] for name in wanted):
            if not _is_done(row, seed, args.steps, read(path)):
                run(row, seed, args.steps, data, folder(args.out, row, seed, args.steps), path)
            report.write(read(path), settings, args.out / "results.md")
            report.draw_budgets(read(path), settings, args.out / "budgets.png")
    if args.latency:
        workdirs = {
            row.name: folder(args.out, row, seeds[0], args.steps)
            for row in (known[report.EVERY], known[report.BASELINE])
        }
        seconds = latency.time_clips(workdirs, data, tuple(BUDGETS))
        points = report.points(read(path), settings, seconds)
        latency.plot(points, args.out / "accuracy_latency.png")
        write_atomically(args.out / "latency.json", json.dumps(_times(seconds), indent=1) + "\n")
    print((args.out / "results.md").read_text())


def folder(out: pathlib.Path, row: Row, seed: int, steps: int) -> pathlib.Path:
    """Where a row is trained."""
    return out / f"{re.sub(r'[ ,]+', '_', row.name)}_seed{seed}_steps{steps}"


def run(
    row: Row, seed: int, steps: int, data: pathlib.Path, workdir: pathlib.Path, path: pathlib.Path
) -> None:
    """Trains and tests a row with one seed, and adds its records."""
    seconds = runs.train(row, data, workdir, seed, steps)
    began = time.monotonic()
    records = list(runs.test(row, data, workdir, seed))
    about = {
        "steps": steps,
        "training_hours": round(seconds / 3600, 4),
        "test_hours": round((time.monotonic() - began) / 3600, 4),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    found = [*read(path), *({**record, **about} for record in records)]
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def _is_done(row: Row, seed: int, steps: int, records: list[dict[str, Any]]) -> bool:
    key = (row.name, seed, steps)
    tested = {r["budget"] for r in records if (r["row"], r["seed"], r["steps"]) == key}
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
