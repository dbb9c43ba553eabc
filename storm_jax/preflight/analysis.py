"""Compiles a program, and keeps what was learned from it: a large program takes minutes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from storm_jax.chips import GIB
from storm_jax.config import MeshConfig
from storm_jax.files import write_atomically
from storm_jax.preflight.cost import count_flops
from storm_jax.preflight.hlo import Program as Hlo
from storm_jax.preflight.programs import Program
from storm_jax.preflight.topologies import Topology
from storm_jax.preflight.traffic import Collectives, collectives, memory_bytes
from storm_jax.sharding import make_mesh

_MODULES = ("analysis", "cost", "hlo", "traffic")
_USED = re.compile(r"\((\d+\.\d+)G\) exceeds available|Used (\d+\.\d+)G of")


class CompilerError(RuntimeError):
    """The compiler failed, but not because the program is too large."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """What the compiler made of a program.

    Attributes:
      memory: bytes on each device, by kind.
      flops: XLA's count over all devices.
      collectives: by kind.
      memory_traffic: bytes that a device reads and writes.
      seconds: that it took to compile.
    """

    memory: Mapping[str, float]
    flops: float
    collectives: Mapping[str, Collectives]
    memory_traffic: float
    seconds: float

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(each.sent for each in self.collectives.values())


def analyse(
    build: Callable[[Mesh], Program], mesh: Mesh, topology: Topology
) -> tuple[Program, Analysis]:
    """Builds and compiles a program, or reads what an earlier call learned about the same one."""
    with live_line(f"lowering for {topology.name}"):
        program = build(mesh)
    path = _cache_folder() / f"{_key(program, topology)}.json"
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        return program, _from_json(json.loads(path.read_text()))
    with live_line(f"counting the FLOPs of {program.title}"):
        flops = _count(build, program)
    with live_line(f"compiling {program.title}"):
        analysis = _compile(program, topology, flops)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(dataclasses.asdict(analysis)))
    return program, analysis


def _compile(program: Program, topology: Topology, flops: float) -> Analysis:
    began, arguments = time.monotonic(), program.argument_bytes()
    if sum(arguments.values()) > topology.chip.memory:
        return _too_large(arguments, 0.0, flops, 0.0)
    try:
        compiled = program.lowered.compile(dict(topology.compiler_options))
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            reason = str(error).split("\n")[0]
            raise CompilerError(
                f"{program.title}: the compiler for {topology.name} fails: {reason}"
            ) from error
        temporaries = float(used[1] or used[2]) * GIB - sum(arguments.values())
        return _too_large(arguments, temporaries, flops, time.monotonic() - began)
    seconds = time.monotonic() - began
    stats: Any = compiled.memory_analysis()
    padding = max(0, stats.argument_size_in_bytes - sum(arguments.values()))
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes
    if topology.devices[0].platform == "tpu":
        # The compiler accepts programs whose arguments and temporaries together exceed its limit: not all of
        # these are needed at once.
        others = stats.argument_size_in_bytes + results
        temporaries = max(0, stats.peak_memory_in_bytes - others)
    hlo = Hlo(compiled.as_text() or "")
    return Analysis(
        memory={
            **arguments,
            "padding": padding,
            "temporaries": temporaries,
            "results": results,
            "code": stats.generated_code_size_in_bytes,
        },
        flops=flops,
        collectives=collectives(hlo, len(topology.devices)),
        memory_traffic=memory_bytes(hlo),
        seconds=seconds,
    )


def _too_large(
    arguments: Mapping[str, float], temporaries: float, flops: float, seconds: float
) -> Analysis:
    """Of a program that was not compiled to the end."""
    memory = {**arguments, "temporaries": max(0.0, temporaries)}
    return Analysis(memory=memory, flops=flops, collectives={}, memory_traffic=0.0, seconds=seconds)


def _count(build: Callable[[Mesh], Program], program: Program) -> float:
    """FLOPs over all devices, from the same program on one CPU: kernels of accelerators cannot be counted."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices("cpu")[:1])
    single = build(mesh)
    with jax.set_mesh(mesh):
        return count_flops(single.traced.jaxpr) * program.rows / single.rows


def _from_json(fields: Mapping[str, Any]) -> Analysis:
    found = {kind: Collectives(**each) for kind, each in fields["collectives"].items()}
    return Analysis(**{**fields, "collectives": found})


def _key(program: Program, topology: Topology) -> str:
    """A digest of all that an analysis depends on: the program, the compiler, and the code that analyses."""
    parts = [topology.name, json.dumps(dict(topology.versions)), program.lowered.as_text() or ""]
    folder = pathlib.Path(__file__).parent
    parts += [(folder / f"{module}.py").read_text() for module in _MODULES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "storm_jax/preflight"


@contextlib.contextmanager
def live_line(text: str) -> Iterator[None]:
    """Shows what is being done, on terminals with the seconds it has taken."""
    began = time.monotonic()
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield
        return
    done = threading.Event()

    def show() -> None:
        while not done.wait(0.2):
            seconds = time.monotonic() - began
            print(f"\r\033[K{text} ({seconds:.0f} s)", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
