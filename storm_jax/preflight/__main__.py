"""Compiles the programs of train.py and eval.py for hardware that is not here, and says what they need.

    python -m storm_jax.preflight --config=configs/storm_qwen2_7b.py:stage=sft --topology=v5p:4x4x8
    python -m storm_jax.preflight --config=configs/storm_qwen2_7b.py:stage=sft --topology=cuda:h200x8 --sweep

Every field of the configuration can be overridden: --config.mesh.fsdp=64. The status is 1 if a program does not
fit. Results are kept, so a second call with the same programs takes seconds. See docs/preflight.md.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import config_flags

from storm_jax import command_line
from storm_jax.config import MeshConfig, RunConfig, from_dict
from storm_jax.data.rows import RowShape, row_shapes
from storm_jax.preflight import topologies
from storm_jax.preflight.advice import advice
from storm_jax.preflight.analysis import CompilerError, analyse
from storm_jax.preflight.programs import (
    Program,
    decode_program,
    encode_program,
    prefill_program,
    train_program,
)
from storm_jax.preflight.report import Result, as_json, table
from storm_jax.preflight.sweep import flags as flags_of
from storm_jax.preflight.sweep import sweep
from storm_jax.preflight.sweep import table as sweep_table
from storm_jax.preflight.topologies import Topology, TopologyError, open_topology
from storm_jax.sharding import make_mesh

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file with its stage, configs/NAME.py:stage=align|sft|long."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, f"Hardware to compile for: {topologies.KNOWN}.", required=True
)
PROGRAMS = flags.DEFINE_enum(
    "programs", "all", ["all", "train", "eval"], "Only the programs of train.py, or of eval.py."
)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
SWEEP = flags.DEFINE_bool(
    "sweep", False, "Try meshes, remat and accumulation for training, and print the best three."
)
flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    jax.config.update("jax_platforms", "cpu")  # nothing runs
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot load what has no device
    config = from_dict(RunConfig, CONFIG.value)
    topology = open_topology(TOPOLOGY.value)
    if SWEEP.value:
        _sweep(config, topology)
        return
    results = []
    if PROGRAMS.value in ("all", "train"):
        for shape in row_shapes(config):
            results.append(_train(config, topology, shape))
    if PROGRAMS.value in ("all", "eval"):
        for build in (encode_program, prefill_program, decode_program):
            build = functools.partial(build, config)
            results.append(_analyse(build, MeshConfig(data=1, fsdp=-1), topology))
    print(json.dumps(as_json(config, results), indent=2) if JSON.value else table(config, results))
    problems = [advice(config, result) for result in results if not result.fits]
    if problems:
        sys.exit("\n".join(f"storm_jax.preflight: {problem}" for problem in problems))


def _sweep(config: RunConfig, topology: Topology) -> None:
    shape = row_shapes(config)[-1]

    def compiled(candidate: RunConfig) -> Result:
        result = _train(candidate, topology, shape)
        fits = "fits" if result.fits else "does not fit"
        print(f"{' '.join(flags_of(candidate))} {fits}", file=sys.stderr, flush=True)
        return result

    best = sweep(config, len(topology.devices), compiled)
    if not best:
        sys.exit(
            f"storm_jax.preflight: nothing fits {topology.name}: use more devices, or smaller data.rows"
        )
    if JSON.value:
        fields = [{"flags": flags_of(each), **result.as_json()} for each, result in best]
        print(json.dumps(fields, indent=2))
    else:
        print(sweep_table(best))


def _train(config: RunConfig, topology: Topology, shape: RowShape) -> Result:
    return _analyse(lambda mesh: train_program(config, mesh, shape), config.mesh, topology)


def _analyse(
    build: Callable[[Mesh], Program], mesh_config: MeshConfig, topology: Topology
) -> Result:
    try:
        mesh = make_mesh(mesh_config, topology.devices)
    except NotImplementedError as error:
        reason = str(error).split(". ")[0]
        raise TopologyError(f"--topology={topology.name} has no such mesh: {reason}") from None
    program, analysis = analyse(build, mesh, topology)
    return Result(program, analysis, topology, mesh)


if __name__ == "__main__":
    command_line.run(main, (TopologyError, CompilerError))
