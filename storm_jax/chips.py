"""Accelerators: memory and peak speeds, from their data sheets."""

from __future__ import annotations

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a program has to fit into, and how fast it could run.

    Attributes:
      memory: bytes that a program may use.
      flops: peak dense bf16 FLOP/s; speeds are None where they are not known.
      bandwidth: of memory, bytes/s.
      interconnect: bytes/s that all links of a chip send together.
    """

    kind: str
    memory: float
    flops: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None


# Memory is what the compiler says it may use: slightly less than the chip has.
# Speeds: cloud.google.com/tpu/docs/v5e, v5p and v6e. The links are listed there in both directions together.
TPUS = {
    "v5e": Chip(
        kind="TPU v5e", memory=15.75 * GIB, flops=197e12, bandwidth=819e9, interconnect=200e9
    ),
    "v5p": Chip(
        kind="TPU v5p", memory=95.74 * GIB, flops=459e12, bandwidth=2765e9, interconnect=600e9
    ),
    "v6e": Chip(
        kind="TPU v6e", memory=31.25 * GIB, flops=918e12, bandwidth=1640e9, interconnect=400e9
    ),
}
# nvidia.com/en-us/data-center/h100 (SXM) and h200. NVLink: 900 GB/s in both directions together.
GPUS = {
    "h100": Chip(
        kind="H100 SXM", memory=79.2 * GIB, flops=989e12, bandwidth=3350e9, interconnect=450e9
    ),
    "h200": Chip(
        kind="H200 SXM", memory=139.8 * GIB, flops=989e12, bandwidth=4800e9, interconnect=450e9
    ),
}
# How JAX calls them.
_KINDS = {
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v5p": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v6e": TPUS["v6e"],
    "NVIDIA H100 80GB HBM3": GPUS["h100"],
    "NVIDIA H200": GPUS["h200"],
}


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device; None if its speed is not known."""
    return _KINDS.get(device.device_kind)
