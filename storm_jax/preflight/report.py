"""What a configuration needs on a topology, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from storm_jax.chips import GIB
from storm_jax.config import RunConfig
from storm_jax.params import abstract_model, flat_params
from storm_jax.preflight.analysis import Analysis
from storm_jax.preflight.programs import Program
from storm_jax.preflight.topologies import Topology
from storm_jax.train.optim import is_trainable, part_of

_MOST_DIGITS = 5
_MEMORY = (
    "parameters", "optimizer state", "cache", "batch", "padding", "temporaries", "results", "code",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """A program, what the compiler made of it, and how fast the hardware could run it."""

    program: Program
    analysis: Analysis
    topology: Topology
    mesh: Mesh

    @property
    def fits(self) -> bool:
        return self.analysis.total_memory <= self.topology.chip.memory

    @property
    def model_flops(self) -> float:
        return sum(part.model for part in self.program.work.values())

    @property
    def formula_flops(self) -> float:
        return sum(part.program for part in self.program.work.values())

    @property
    def times(self) -> dict[str, float]:
        """Seconds that each resource needs if it is used at its peak; empty for CPUs and programs that do not fit."""
        chip, count = self.topology.chip, len(self.topology.devices)
        if not (self.fits and chip.flops and chip.bandwidth and chip.interconnect):
            return {}
        return {
            "compute": self.analysis.flops / count / chip.flops,
            "memory": self.analysis.memory_traffic / chip.bandwidth,
            "interconnect": self.analysis.sent / chip.interconnect,
        }

    @property
    def bound(self) -> str:
        """The resource that needs most time."""
        return max(self.times, key=lambda name: self.times[name], default="")

    @property
    def seconds(self) -> float:
        """Time of a call if all resources are used at their peak, at the same time; NaN without `times`."""
        return max(self.times.values(), default=math.nan)

    @property
    def mfu(self) -> float:
        """Model FLOP/s as a fraction of the peak, in that time."""
        chip, count = self.topology.chip, len(self.topology.devices)
        return self.model_flops / (count * (chip.flops or math.nan) * self.seconds)

    def as_json(self) -> dict[str, Any]:
        program, learned = self.program, dataclasses.asdict(self.analysis)
        work = {part: dataclasses.asdict(passes) for part, passes in program.work.items()}
        fields = {
            "program": program.name,
            "mesh": dict(self.mesh.shape),
            "rows": program.rows,
            "tokens": program.rows * program.tokens,
            "frames": program.rows * program.frames,
            "fits": self.fits,
            **learned,
            "flops": {
                "model": self.model_flops,
                "formula": self.formula_flops,
                "xla": self.analysis.flops,
                "parts": work,
            },
        }
        if self.times:
            fields |= {"times": self.times, "bound": self.bound, "mfu": self.mfu}
        return fields


def parameter_counts(config: RunConfig) -> dict[str, dict[str, int]]:
    """Numbers of trained and frozen parameters of each part."""
    counts: dict[str, dict[str, int]] = {}
    for name, leaf in flat_params(abstract_model(config.model)[1]).items():
        part = counts.setdefault(part_of(name), {"trained": 0, "frozen": 0})
        part["trained" if is_trainable(name, config) else "frozen"] += math.prod(leaf.shape)
    return {part: counts[part] for part in ("vision", "projector", "decoder")}


def as_json(config: RunConfig, results: Sequence[Result]) -> dict[str, Any]:
    """Everything in the table, in bytes, FLOPs and seconds."""
    topology = results[0].topology
    return {
        "topology": topology.name,
        "chip": dataclasses.asdict(topology.chip),
        "devices": len(topology.devices),
        "versions": dict(topology.versions),
        "parameters": parameter_counts(config),
        "programs": [result.as_json() for result in results],
    }


def table(config: RunConfig, results: Sequence[Result]) -> str:
    """The table that people read."""
    topology = results[0].topology
    chip = topology.chip
    train = config.train
    lines = [
        f"{topology.name}: {len(topology.devices)} x {chip.kind}, {chip.memory / GIB:.2f} GiB usable each; "
        f"accumulation {train.accumulation}, remat {train.remat}",
        "",
        *_parameter_lines(config),
        "",
        *_program_lines(results),
    ]
    return "\n".join(lines)


def _parameter_lines(config: RunConfig) -> list[str]:
    counts = parameter_counts(config)
    counts["total"] = {
        kind: sum(part[kind] for part in counts.values()) for kind in ("trained", "frozen")
    }
    rows = [["parameters", "trained", "frozen"]]
    for part, count in counts.items():
        rows.append([f"  {part}", *(cell(count[kind]) for kind in ("trained", "frozen"))])
    return align(rows)


def _program_lines(results: Sequence[Result]) -> list[str]:
    limit = results[0].topology.chip.memory
    lines = [
        ["", *(result.program.name for result in results)],
        ["mesh: data x fsdp x context x tensor", *map(_mesh_shape, results)],
        *_rows(
            results,
            lambda result: {
                "rows": result.program.rows,
                "tokens of a row": result.program.tokens,
                "frames of a row": result.program.frames,
                "tokens": result.program.rows * result.program.tokens,
                "frames": result.program.rows * result.program.frames,
            },
        ),
        ["memory of a device, GiB"],
        *_rows(
            results,
            lambda result: {
                **{f"  {kind}": result.analysis.memory.get(kind, 0) / GIB for kind in _MEMORY},
                f"  total, of {limit / GIB:.2f}": result.analysis.total_memory / GIB,
            },
        ),
        ["TFLOPs of all devices"],
        *_rows(
            results,
            lambda result: {
                "  model": result.model_flops / 1e12,
                "  program, by formula": result.formula_flops / 1e12,
                "  program, by XLA": result.analysis.flops / 1e12,
            },
        ),
        ["traffic of a device, GiB"],
        *_rows(
            results,
            lambda result: {
                "  memory": result.analysis.memory_traffic / GIB,
                **{
                    f"  {kind}": each.sent / GIB
                    for kind, each in result.analysis.collectives.items()
                },
            },
        ),
    ]
    if any(result.times for result in results):
        lines += [
            ["time at peak, ms"],
            *_rows(results, lambda result: {f"  {k}": 1e3 * v for k, v in result.times.items()}),
            ["bound by", *(result.bound or "-" for result in results)],
            *_rows(
                results,
                lambda result: {
                    "tokens a second": result.program.rows * result.program.tokens / result.seconds,
                    "frames a second": result.program.rows * result.program.frames / result.seconds,
                },
            ),
            ["MFU at that bound", *(f"{r.mfu:.1%}" if r.times else "-" for r in results)],
        ]
    lines += _rows(results, lambda result: {"seconds to compile": result.analysis.seconds})
    return align(lines)


def _mesh_shape(result: Result) -> str:
    return "x".join(map(str, result.mesh.shape.values()))


def _rows(
    results: Sequence[Result], values: Callable[[Result], Mapping[str, float]]
) -> list[list[str]]:
    """A row for each name that is not zero in all results."""
    found = [values(result) for result in results]
    names = dict.fromkeys(name for each in found for name in each)
    return [
        [name, *(cell(each.get(name, 0)) for each in found)]
        for name in names
        if any(each.get(name) for each in found)
    ]


def cell(value: float) -> str:
    """An integer, or a number with three significant digits; "-" for none."""
    if not value or math.isnan(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, digits)}f}" if digits <= _MOST_DIGITS else f"{value:.0e}"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pads cells: names to the left, values to the right."""
    count = max(map(len, rows))
    filled = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in filled
    ]
