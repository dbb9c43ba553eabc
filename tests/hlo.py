"""The collectives of a compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_BYTES = {"pred": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its results on a device
    shapes: tuple[tuple[int, ...], ...]
    name: str  # path of named scopes and primitives


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """The collectives in the text of a program, each once, also those of loops."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if not match:
            continue
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        shapes = [tuple(int(n) for n in sizes.split(",") if n) for _, sizes in arrays]
        size = sum(
            _BYTES[dtype] * math.prod(shape)
            for (dtype, _), shape in zip(arrays, shapes, strict=True)
        )
        name = re.search(r'op_name="([^"]*)"', line)
        found.append(Collective(match[2], size, tuple(shapes), name[1] if name else ""))
    return found
