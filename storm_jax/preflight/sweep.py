"""Looks for the fastest mesh, remat and accumulation with which a training step fits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

from storm_jax.chips import GIB
from storm_jax.config import MeshConfig, RunConfig
from storm_jax.preflight.analysis import CompilerError
from storm_jax.preflight.report import Result, cell
from storm_jax.preflight.topologies import TopologyError

_SIZES = (2, 4)  # of one other mesh axis next to fsdp
_ACCUMULATION = (1, 2, 4, 8, 16, 64, 256)
_SHOWN = 3

Candidate = tuple[RunConfig, Result]


def sweep(
    config: RunConfig, devices: int, analyse: Callable[[RunConfig], Result]
) -> Sequence[Candidate]:
    """The best configurations that fit, at most one of each mesh, fastest first.

    Args:
      analyse: compiles the training step of a configuration.
    """
    found = []
    for candidates in _by_mesh(config, devices):
        for candidate in candidates:
            try:
                result = analyse(candidate)
            except TopologyError:  # the devices cannot be arranged in this mesh
                break
            except CompilerError as error:
                logging.warning("%s", error)
                continue
            if result.fits:
                found.append((candidate, result))
                break
    return sorted(found, key=_rank)[:_SHOWN]


def _by_mesh(config: RunConfig, devices: int) -> Iterator[list[RunConfig]]:
    """The configurations of each mesh, from the one that needs most memory to the one that needs least.

    The first that fits is the fastest: remat and accumulation only save memory.
    """
    others = [{axis: size} for axis in ("data", "tensor", "context") for size in _SIZES]
    for sizes in ({}, *others, {"data": devices}):
        axes = {"data": 1, "context": 1, "tensor": 1, **sizes}
        product = axes["data"] * axes["context"] * axes["tensor"]
        if devices % product == 0:
            mesh = MeshConfig(fsdp=devices // product, **axes)
            yield list(_of_mesh(dataclasses.replace(config, mesh=mesh)))


def _of_mesh(config: RunConfig) -> Iterator[RunConfig]:
    rows = config.mesh.data * config.mesh.fsdp
    for remat, accumulation in ((False, 1), *((True, count) for count in _ACCUMULATION)):
        train = dataclasses.replace(config.train, remat=remat, accumulation=accumulation)
        candidate = dataclasses.replace(config, train=train)
        if train.batch_size % (accumulation * rows) == 0 and not candidate.problems():
            yield candidate


def _rank(candidate: Candidate) -> tuple[float, float]:
    """By time, and without speeds by memory."""
    _, result = candidate
    return (result.seconds if result.times else 0, result.analysis.total_memory)


def table(best: Sequence[Candidate]) -> str:
    """What each candidate needs, and the flags that select it."""
    lines = []
    for config, result in best:
        needs = f"{cell(result.analysis.total_memory / GIB)} GiB a device"
        if result.times:
            needs += f", {cell(1e3 * result.seconds)} ms a step at peak, bound by {result.bound}, MFU {result.mfu:.1%}"
        lines += [needs, f"  {' '.join(flags(config))}"]
    return "\n".join(lines)


def flags(config: RunConfig) -> list[str]:
    """The flags that select a candidate."""
    mesh, train = config.mesh, config.train
    axes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "context", "tensor")}
    return [
        *(f"--config.mesh.{axis}={size}" for axis, size in axes.items()),
        f"--config.train.remat={train.remat}",
        f"--config.train.accumulation={train.accumulation}",
    ]
