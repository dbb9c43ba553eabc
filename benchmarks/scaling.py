"""Weak scaling as compiled: what a device computes, stores and sends as devices and rows grow together.

    python -m benchmarks.scaling --out=runs/scaling

Runs `storm_jax.preflight` for 1 to 256 TPU v5p with one row per device: up to 4 on the axis fsdp, which is one host, and
the rest on data. The programs are compiled by XLA for these chips, but do not run, so there are no times. Interrupted
calls resume: preflight keeps what it has compiled. Needs libtpu.

Writes OUT/scaling.json and OUT/scaling.png, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.preflights import preflight
from storm_jax.files import write_atomically

TOPOLOGIES = ("1x1x1", "2x2x1", "2x2x4", "4x4x4", "4x8x8")
FSDP = 4  # the largest power of two that leaves a device whole tiles of 128 of the 1536 columns
GIB = 2**30


def measure(config: str, topology: str) -> dict[str, Any]:
    """The facts of preflight about a training step with one row per device."""
    devices = math.prod(map(int, topology.split("x")))
    flags = (
        "--config.mesh.data=-1",
        f"--config.mesh.fsdp={min(devices, FSDP)}",
        f"--config.train.batch_size={devices}",
    )
    found = preflight(config, f"v5p:{topology}", *flags)["programs"][-1]  # of the largest row
    memory = {kind: size for kind, size in found["memory"].items() if size > 2**20}
    return {
        "devices": devices,
        "fits": found["fits"],
        "flops": found["flops"]["xla"] / devices,
        "memory": memory,
        "sent": {kind: each["sent"] for kind, each in found["collectives"].items()},
    }


def table(points: Sequence[dict[str, Any]]) -> str:
    """One line per number of devices; everything is per device."""
    lines = [
        "devices   TFLOPs   parameters   optimizer   temporaries   all memory, GiB   sent, GiB"
    ]
    for point in points:
        memory, sent = point["memory"], sum(point["sent"].values())
        sizes = [memory.get(kind, 0) for kind in ("parameters", "optimizer state", "temporaries")]
        cells = [f"{size / GIB:.2f}" for size in (*sizes, sum(memory.values()), sent)]
        widths = (10, 11, 13, 17, 11)
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        note = "" if point["fits"] else "   does not fit"
        lines.append(f"{point['devices']:>7}  {point['flops'] / 1e12:>7.1f}  {numbers}{note}")
    return "\n".join(lines)


def plot(points: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """FLOPs, memory and sent bytes of a device against the number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    flops, memory, sent = figure.subplots(1, 3)
    devices = [point["devices"] for point in points]
    flops.plot(devices, [point["flops"] / 1e12 for point in points], "o-")
    flops.set(title="TFLOPs of a step", ylim=(0, None))
    for axis, field, title in (
        (memory, "memory", "Memory, GiB"),
        (sent, "sent", "Sent in a step, GiB"),
    ):
        kinds = sorted({kind for point in points for kind in point[field]})
        series = [[point[field].get(kind, 0) / GIB for point in points] for kind in kinds]
        axis.stackplot(devices, series, labels=kinds, alpha=0.85)
        axis.set(title=title, ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    for axis in (flops, memory, sent):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="devices, one row each", xticks=devices, xticklabels=devices)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/storm_qwen2_1_5b.py:stage=long")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    points: list[dict[str, Any]] = []
    for topology in TOPOLOGIES:
        points.append(measure(args.config, topology))
        results = {"config": args.config, "chip": "v5p", "per_device": points}
        write_atomically(args.out / "scaling.json", json.dumps(results, indent=1) + "\n")
    plot(points, args.out / "scaling.png")
    print(table(points))


if __name__ == "__main__":
    main()
