"""What to change in a configuration that does not fit."""

from __future__ import annotations

from storm_jax.chips import GIB
from storm_jax.config import RunConfig
from storm_jax.preflight.report import Result

_STATE = ("parameters", "optimizer state")


def advice(config: RunConfig, result: Result) -> str:
    """One line: how much is missing, and the changes that save most."""
    limit, need = result.topology.chip.memory, result.analysis.total_memory
    changes = _training(config, result) if result.program.name == "train" else _evaluation()
    return (
        f"{result.program.title} does not fit: it needs {need / GIB:.2f} GiB a device, "
        f"{result.topology.chip.kind} has {limit / GIB:.2f}. Try {', or '.join(changes)}"
    )


def _training(config: RunConfig, result: Result) -> list[str]:
    train, mesh = config.train, result.mesh.shape
    arguments, limit = result.program.argument_bytes(), result.topology.chip.memory
    rows = train.batch_size // train.accumulation // (mesh["data"] * mesh["fsdp"])
    changes = []
    if mesh["data"] > 1 and sum(arguments[kind] for kind in _STATE) > limit / 2:
        changes.append("--config.mesh.data=1 --config.mesh.fsdp=-1, which shards the state further")
    if not train.remat:
        changes.append("--config.train.remat=True")
    if rows > 1:
        factor = next(size for size in range(2, rows + 1) if rows % size == 0)
        changes.append(f"--config.train.accumulation={factor * train.accumulation}")
    elif all(
        slots % (2 * mesh["context"]) == 0
        for row in config.data.rows
        for slots in (row.tokens, row.frames)
    ):
        changes.append(
            f"--config.mesh.context={2 * mesh['context']}, which splits rows, with half of the batch_size or "
            f"accumulation"
        )
    return [*changes, "smaller data.rows", "more devices"]


def _evaluation() -> list[str]:
    return [
        "fewer frames or more pooling (compression)",
        "a smaller eval.py --batch_size",
        "more devices",
    ]
