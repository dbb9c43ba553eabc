"""Memory that programs need on a device."""

from __future__ import annotations

from typing import Any

import torch


def program_bytes(compiled: Any) -> int:
    """Bytes of a compiled JAX program: inputs, outputs and temporary arrays; donated inputs count once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def reset_torch_bytes() -> None:
    """Starts to measure what `torch_bytes` returns."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def torch_bytes() -> int | None:
    """The most bytes that torch held on the GPU since its statistics were reset; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
