"""Compiles the selective scan for GPUs and TPUs on a machine without them, and measures its memory.

    python -m benchmarks.scan_compile --target=sm_90 --out=runs/scan_compile     H100, H200
    python -m benchmarks.scan_compile --target=v5e --out=runs/scan_compile
    python -m benchmarks.scan_compile --target=v5p --out=runs/scan_compile

Runs the real compilers on a CPU, but not the programs: it says nothing about speed or numerics. Requires
packages that are not in requirements.txt; the error message names the missing ones.

Writes OUT/TARGET.json with, for each size and implementation, the compile time and the temporary memory, in
bytes and relative to an fp32 array of x's shape; the same for a bidirectional mixer, with the number of
copies and transposes of arrays of x's size; and for sm_90 the registers and spills of each kernel.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from storm_jax.config import MambaConfig
from storm_jax.models.mamba import MambaMixer
from storm_jax.ops import selective_scan as scan_module
from storm_jax.ops.selective_scan import selective_scan

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
KERNEL = {"sm_90": "pallas_gpu", "v5e": "pallas_tpu", "v5p": "pallas_tpu"}
SIZES = (  # batch, length (frames x 256 tokens), inner width for a 1.5B and a 7B decoder
    (1, 32_768, 2304),
    (8, 32_768, 2304),
    (1, 131_072, 7168),
)
MIXER = (1, 32_768, 1152)  # batch, length, width
D_STATE = 16
# Without these, libtpu queries the TPU VM that it expects to run on, and allows a single process.
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# XLA's description of an H200 (from NVIDIA's data sheet and the CUDA programming guide).
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
}
"""


def device(target: str) -> Any:
    """Returns a compile-only device of the target."""
    if target == "sm_90":
        require("jax_plugins", f"jax-cuda12-pjrt=={jax.__version__}", "nvidia-cuda-nvcc-cu12")
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H200
        )
    else:
        require("libtpu", "libtpu")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target])
    return topology.devices[0]


def require(module: str, *packages: str) -> None:
    if importlib.util.find_spec(module) is None:
        sys.exit(
            f"the compiler for this target is not installed: pip install --no-deps {' '.join(packages)}"
        )


def compile_scan(
    chip: Any, size: tuple[int, int, int], dtype: Any, implementation: str, gradients: bool
) -> dict[str, Any]:
    """Compiles the scan, or the scan and the gradients of all inputs, for one device."""
    batch, length, width = size

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))

    per_channel = functools.partial(array, dtype=jnp.float32)
    x = array(batch, length, width)
    inputs: dict[str, Any] = {
        "x": x,
        "dt": x,
        "A": per_channel(width, D_STATE),
        "B": array(batch, length, D_STATE),
        "C": array(batch, length, D_STATE),
        "D": per_channel(width),
        "dt_bias": per_channel(width),
    }

    def program(inputs: dict[str, Any], dy: jax.Array) -> Any:
        def outputs(inputs: dict[str, Any]) -> jax.Array:
            return selective_scan(**inputs, implementation=implementation)[0]

        if not gradients:
            return outputs(inputs)
        y, pullback = jax.vjp(outputs, inputs)
        return y, pullback(dy)

    began = time.perf_counter()
    compiled: Any = jax.jit(program).lower(inputs, x).compile()
    taken = time.perf_counter() - began
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {
        "compile_seconds": round(taken, 1),
        "temporary_bytes": temporary,
        "temporary_per_fp32_input": round(temporary / (batch * length * width * 4), 2),
    }


def compile_mixer(chip: Any, implementation: str, gradients: bool) -> dict[str, Any]:
    """Compiles a bidirectional Mamba-1 mixer in bfloat16, or its gradients, for one device."""
    batch, length, width = MIXER
    config = MambaConfig(d_state=D_STATE)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))

    graphdef, state = nnx.split(
        nnx.eval_shape(
            lambda: MambaMixer(
                width, "mamba1", config, rngs=nnx.Rngs(0), dtype=jnp.dtype("bfloat16")
            )
        )
    )
    params = jax.tree.map(lambda v: array(v.shape, v.dtype), nnx.to_pure_dict(state))
    u, clip = array(MIXER, jnp.bfloat16), array((batch, length), jnp.int32)

    def outputs(params: Any, u: jax.Array, clip: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(u, clip)[0]

    def program(params: Any, u: jax.Array, clip: jax.Array, dy: jax.Array) -> Any:
        if not gradients:
            return outputs(params, u, clip)
        y, pullback = jax.vjp(lambda params, u: outputs(params, u, clip), params, u)
        return y, pullback(dy)

    # By default the implementation is chosen for the CPU that this runs on.
    with mock.patch.object(scan_module, "fastest", lambda backend, d_state: implementation):
        compiled: Any = jax.jit(program).lower(params, u, clip, u).compile()
    inner = batch * length * config.expand * width
    return {
        "temporary_per_fp32_input": round(
            compiled.memory_analysis().temp_size_in_bytes / (inner * 4), 2
        ),
        "copies": whole_copies(compiled.as_text(), inner),
    }


MOVES = {"copy", "transpose", "reverse"}
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]*)\]\S* ([\w-]+)\((.*)")


def whole_copies(program: str, elements: int) -> int:
    """Counts unfused copies, transposes and reversals of at least `elements` elements."""
    computations: dict[str, list[tuple[str, str, str]]] = {}
    for line in program.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = computations.setdefault(opened[1], [])
        elif found := INSTRUCTION.match(line):
            inside.append((found[1], found[2], found[3]))

    def called(rest: str) -> str:
        return re.search(r"calls=%?([\w.-]+)", rest)[1]  # type: ignore[index]

    fusions = {called(r) for all_ in computations.values() for _, op, r in all_ if op == "fusion"}

    def moves(op: str, rest: str) -> bool:
        if op != "fusion":
            return op in MOVES
        operations = {op for _, op, _ in computations[called(rest)]}
        return bool(operations & MOVES) and operations <= MOVES | {"parameter", "bitcast"}

    return sum(
        math.prod(int(n) for n in shape.split(",") if n) >= elements and moves(op, rest)
        for name, instructions in computations.items()
        if name not in fusions
        for shape, op, rest in instructions
    )


def compile_all(target: str) -> dict[str, Any]:
    """Returns the report on a target, without its kernels."""
    chip = device(target)
    programs = []
    for implementation in (KERNEL[target], "chunked"):
        for size, dtype, gradients in itertools.product(
            SIZES, (jnp.bfloat16, jnp.float32), (False, True)
        ):
            row: dict[str, Any] = {
                "implementation": implementation,
                **dict(zip(("batch", "length", "width"), size, strict=True)),
                "state": D_STATE,
                "dtype": jnp.dtype(dtype).name,
                "gradients": gradients,
            }
            try:
                row |= compile_scan(chip, size, dtype, implementation, gradients)
            except (
                jax.errors.JaxRuntimeError
            ) as error:  # does not fit into memory, which is a result
                row["error"] = str(error).split("\n")[0]
            print(row, flush=True)
            programs.append(row)
    mixers = []
    for gradients in (False, True):
        row = {"size": MIXER, "gradients": gradients}
        mixers.append(row | compile_mixer(chip, KERNEL[target], gradients))
        print(mixers[-1], flush=True)
    return {
        "target": target,
        "device": chip.device_kind,
        "jax": jax.__version__,
        "programs": programs,
        "mixers": mixers,
    }


def kernel_registers(dumped: pathlib.Path) -> dict[str, dict[str, int]]:
    """Returns the registers and spilled bytes of our kernels, by running ptxas on the dumped PTX.

    Values are the maximum over all sizes and dtypes.
    """
    found: dict[str, dict[str, int]] = {}
    nvcc = importlib.util.find_spec("nvidia.cuda_nvcc")
    folders = [f"{path}/bin" for path in (nvcc.submodule_search_locations if nvcc else None) or []]
    ptxas = shutil.which("ptxas", path=os.pathsep.join([*folders, os.environ["PATH"]]))
    for path in sorted(dumped.glob("*.ptx")):
        target = re.search(r"\.target (\w+)", path.read_text())
        if target is None or ptxas is None:
            continue
        command = [ptxas, "-v", f"-arch={target[1]}", str(path), "-o", os.devnull]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for name, stores, loads, registers in re.findall(
            r"Function properties for (selective_scan\w+)\n.*?(\d+) bytes spill stores, "
            r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
            output,
        ):
            worst = found.setdefault(
                name, {"registers": 0, "spilled_stored": 0, "spilled_loaded": 0}
            )
            for key, value in zip(worst, (registers, stores, loads), strict=True):
                worst[key] = max(worst[key], int(value))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scan_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=list(KERNEL), required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="output folder")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= WITHOUT_A_TPU
    with tempfile.TemporaryDirectory() as dumped:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dumped}"
        report = compile_all(args.target)
        if args.target == "sm_90":
            report["kernels"] = kernel_registers(pathlib.Path(dumped))
            print(report["kernels"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.target}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
