"""The table of docs/preflight.md: the stages of the 7B model on three machines, as compiled.

    python -m benchmarks.presets --out=runs/presets

Runs `storm_jax.preflight` for each stage of configs/storm_qwen2_7b.py and each of its SETUPS. Interrupted calls resume:
preflight keeps what it has compiled. Needs libtpu and the CUDA plugin of JAX.

Writes OUT/presets.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.preflights import preflight
from configs.storm_qwen2_7b import MODEL, SETUPS, stages
from storm_jax.evals.report.text import markdown
from storm_jax.files import write_atomically

GIB = 2**30


def rows(stage: str, hardware: str) -> list[dict[str, Any]]:
    """A table row for each row shape of a stage."""
    found = preflight(f"configs/storm_qwen2_7b.py:stage={stage},on={hardware}", hardware)
    return [
        {
            "stage": stage,
            "hardware": hardware,
            "mesh": program["mesh"],
            "accumulation": SETUPS[hardware].accumulation,
            "tokens": program["tokens"] // program["rows"],
            "frames": program["frames"] // program["rows"],
            "memory": sum(program["memory"].values()),
            "of": found["chip"]["memory"],
            "fits": program["fits"],
            "flops": program["flops"],
            "sent": sum(each["sent"] for each in program["collectives"].values()),
            "times": program.get("times", {}),
            "bound": program.get("bound", ""),
            "mfu": program.get("mfu"),
        }
        for program in found["programs"]
    ]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    found = [
        [
            "stage", "row: tokens, frames", "hardware", "mesh", "microbatches", "memory, GiB", "compute, s",
            "memory traffic, s", "interconnect, s", "MFU at the bound",
        ]
    ]  # fmt: skip
    for line in lines:
        mesh = " x ".join(str(size) for size in line["mesh"].values())
        fits = "" if line["fits"] else ": does not fit"
        memory = f"{line['memory'] / GIB:.1f} of {line['of'] / GIB:.1f}{fits}"
        seconds = [f"{line['times'].get(name, float('nan')):.1f}" for name in
                   ("compute", "memory", "interconnect")]  # fmt: skip
        cells = [
            line["stage"], f"{line['tokens']:,}, {line['frames']}", line["hardware"], mesh,
            str(line["accumulation"]), memory, *seconds, f"{line['mfu'] or float('nan'):.0%}",
        ]  # fmt: skip
        found.append(cells)
    return markdown(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for stage in stages(MODEL):
        for hardware in SETUPS:
            lines += rows(stage, hardware)
            write_atomically(args.out / "presets.json", json.dumps(lines, indent=1) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
