"""The hardware to compile for: its chips, and devices that can be compiled for but not used."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from packaging.requirements import Requirement

from storm_jax.chips import GPUS, TPUS, Chip

_GPUS_OF_A_HOST = 8
_TPUS_OF_A_HOST = 4
# JAX takes this fraction of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_GPU_FRACTION = 0.75


class TopologyError(ValueError):
    """The topology is unknown, or a package that compiles for it is missing."""


# What XLA has to know of a GPU that is not here (a GpuTargetConfig), from NVIDIA's Hopper white paper.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {chip.memory:.0f}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "NVIDIA {chip.kind}"
"""
KNOWN = "v5e:16x16, v5p:4x4x8, v6e:16x16, cuda:h100x8, cuda:h200x8, cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      versions: of the packages that the compiled program depends on.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    versions: Mapping[str, str]
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_topology(name: str) -> Topology:
    """Opens a topology such as `v5p:4x4x8`, `cuda:h200x8` or `cpu:8`. No accelerator is initialised.

    Raises:
      TopologyError: naming what is wrong with it, or the pip command of the missing package.
    """
    platform, _, size = name.partition(":")
    if platform in TPUS and re.fullmatch(r"\d+(x\d+){1,2}", size):
        return _tpus(name)
    gpu = re.fullmatch(r"(\w+?)x(\d+)", size)
    if platform == "cuda" and gpu and gpu[1] in GPUS:
        return _gpus(name, gpu[1], int(gpu[2]))
    if platform == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return _cpus(name, int(size))
    raise TopologyError(f"--topology={name} is not known: write it as one of {KNOWN}")


def _tpus(name: str) -> Topology:
    versions = _required("tpu", "libtpu")
    # Otherwise libtpu looks for the host of a TPU, and warns that there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used
    sizes = [int(size) for size in name.partition(":")[2].split("x")]
    part_of_a_host = {"chips_per_host_bounds": [*sizes, 1][:3]}
    options = part_of_a_host if math.prod(sizes) < _TPUS_OF_A_HOST else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0]
        raise TopologyError(f"--topology={name}: libtpu refuses it ({reason})") from None
    return Topology(name, TPUS[name.partition(":")[0]], found.devices, versions)


def _gpus(name: str, kind: str, count: int) -> Topology:
    if not 1 <= count <= _GPUS_OF_A_HOST:
        raise TopologyError(
            f"--topology={name}: {count} GPUs are not one machine of 1 to {_GPUS_OF_A_HOST}"
        )
    versions = _required("cuda13-local", "jax-cuda13-plugin", "jax-cuda13-pjrt")
    chip = GPUS[kind]
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_FRACTION))
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x1x{count}",  # partitions x hosts x devices
        target_config=_HOPPER.format(chip=chip),
    )
    usable = dataclasses.replace(chip, memory=fraction * chip.memory)
    # Triton's matrix products need autotuning, which needs the GPU.
    options = {"xla_gpu_enable_triton_gemm": False}
    return Topology(name, usable, found.devices, versions, options)


def _cpus(name: str, count: int) -> Topology:
    with contextlib.suppress(RuntimeError):  # too late: devices have been used
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TopologyError(f"--topology={name}: only {len(devices)} CPU devices are available")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    chip = Chip(kind="CPU", memory=memory / count)  # the devices share it
    return Topology(name, chip, devices[:count], _versions("jax", "jaxlib"))


def _required(extra: str, *packages: str) -> dict[str, str]:
    """The versions of `packages`, which have to be those that JAX pins in its `extra`.

    Raises:
      TopologyError: with the pip command that installs them.
    """
    requirements = [Requirement(text) for text in importlib.metadata.requires("jax") or ()]
    pins = [pin for pin in requirements if pin.marker and pin.marker.evaluate({"extra": extra})]
    pin = next(pin for pin in pins if pin.name == packages[0])
    command = "pip install --no-deps " + " ".join(f"'{name}{pin.specifier}'" for name in packages)
    try:
        versions = _versions("jax", "jaxlib", *packages)
    except importlib.metadata.PackageNotFoundError as error:
        raise TopologyError(f"package {error.name} is missing: {command}") from None
    for package in packages:
        if not pin.specifier.contains(versions[package]):
            raise TopologyError(
                f"{package} {versions[package]} is not the version that jax {versions['jax']} needs: "
                f"{command}"
            )
    return versions


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}
