"""What a compiled program moves: between devices, and between a device and its memory."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from storm_jax.preflight.hlo import Array, Computation, Instruction, Program

# Bytes that a device sends in a ring of n, per byte of the largest array of the collective (its input or result).
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
_GROUPS = (
    re.compile(r"replica_groups=\{\{([\d,]+)\}"),  # {{0,1},{2,3}}
    re.compile(r"replica_groups=\[\d+,(\d+)\]<="),  # [2,2]<=[4]
    # mesh['a'=2,'b'=2] {'b'}, or mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}
    re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}"),
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
# These move nothing; the computations of a call, a loop or a conditional are counted for themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "domain",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind in a run of the program.

    Attributes:
      count: how many run.
      sent: bytes that each device sends, on average, in all of them.
    """

    count: int = 0
    sent: float = 0.0


def collectives(program: Program, devices: int) -> dict[str, Collectives]:
    """The collectives of a program by kind."""
    found: dict[str, Collectives] = {}
    seen = set()
    for computation, instruction, times in program.runs():
        for kind, each in _collectives_in(program, instruction):
            # A TPU may split a collective over several fusions, which have the same channel.
            channel = _CHANNEL.search(each.attributes)
            if each is not instruction and channel:
                place = (id(computation), channel[1])
                if place in seen:
                    continue
                seen.add(place)
            before = found.get(kind, Collectives())
            sent = _SENT[kind](_group_size(each, devices)) * _full_size(each, devices)
            found[kind] = Collectives(before.count + times, before.sent + times * sent)
    return dict(sorted(found.items()))


def _collectives_in(
    program: Program, instruction: Instruction
) -> Iterator[tuple[str, Instruction]]:
    """The kind of a collective, or those that a fusion contains."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in _SENT:
        yield kind, instruction
    if instruction.opcode == "fusion":
        for called in instruction.called:
            # A TPU's reduce-scatter: an all-reduce of which each device keeps a slice.
            scatters = called.startswith("all-reduce-scatter")
            for inner in program.computations[called].values():
                for kind, each in _collectives_in(program, inner):
                    yield "reduce-scatter" if scatters and kind == "all-reduce" else kind, each


def _full_size(collective: Instruction, devices: int) -> float:
    """Bytes of the gathered or unreduced arrays."""
    arrays, opcode = collective.arrays, collective.opcode
    if opcode in ("all-gather-start", "collective-permute-start", "reduce-scatter-start"):
        arrays = tuple(array for array in arrays if array.dtype != "u32")
        half = len(arrays) // 2  # inputs, then results
        arrays = arrays[:half] if opcode == "reduce-scatter-start" else arrays[half:]
    size = sum(array.size for array in arrays)
    return size * _group_size(collective, devices) if opcode == "reduce-scatter" else size


def _group_size(collective: Instruction, devices: int) -> int:
    """How many devices exchange data with each other."""
    text = collective.attributes
    listed, iota, mesh = (pattern.search(text) for pattern in _GROUPS)
    if listed:
        return listed[1].count(",") + 1
    if iota:
        return int(iota[1])
    if mesh:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def memory_bytes(program: Program) -> float:
    """Bytes that a device reads from its memory and writes to it.

    Every instruction reads its operands and writes its result, except that slices are read, and updated in place.
    """
    return sum(
        times * _accessed(program, computation, instruction)
        for computation, instruction, times in program.runs()
    )


def _accessed(program: Program, computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    result = _size(instruction.arrays)
    if "__cublas" in instruction.attributes:
        result = _size(instruction.arrays[:1])  # the second is a workspace
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if opcode == "dynamic-update-slice":
        return 2 * _size(computation[instruction.operands[1]].arrays)
    if opcode.endswith("-start"):  # the result of a collective or a copy has its operands too
        return result
    if opcode == "fusion":
        return _accessed_by_fusion(program, computation, instruction)
    return result + sum(_size(computation[name].arrays) for name in instruction.operands)


def _accessed_by_fusion(program: Program, computation: Computation, fusion: Instruction) -> float:
    (called,) = fusion.called
    body = program.computations[called]
    total = 0.0
    for number, name in enumerate(fusion.operands):
        whole = _size(computation[name].arrays)
        total += min(whole, _read(program, body, number)) if whole else 0
    root = next(each for each in body.values() if each.is_root)
    roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(fusion.arrays):  # some of the results are tuples themselves
        return total + _size(fusion.arrays)
    written = (_written(body, *pair) for pair in zip(roots, fusion.arrays, strict=True))
    return total + sum(written)


def _written(body: Computation, root: Instruction, array: Array) -> float:
    """Bytes that a fused computation writes to one of its results."""
    while root.opcode == "bitcast":
        root = body[root.operands[0]]
    if array.in_hbm and root.opcode == "dynamic-update-slice":
        return _size(body[root.operands[1]].arrays)
    return _size((array,))


def _read(program: Program, body: Computation, number: int) -> float:
    """Bytes of its `number`-th parameter that a fused computation reads."""
    parameter = next(
        each
        for each in body.values()
        if each.opcode == "parameter" and each.arguments == str(number)
    )
    return _read_by_users(program, body, parameter)


def _read_by_users(program: Program, body: Computation, value: Instruction) -> float:
    total, whole = 0.0, _size(value.arrays)
    for user in body.values():
        for place in (i for i, name in enumerate(user.operands) if name == value.name):
            sliced = place == 0 and user.opcode in ("dynamic-slice", "slice", "gather")
            updated = place == 0 and user.opcode == "dynamic-update-slice"
            if sliced:
                total += _size(user.arrays)
            elif user.opcode == "bitcast":
                total += _read_by_users(program, body, user)
            elif user.opcode == "fusion":
                total += _read(program, program.computations[user.called[0]], place)
            elif not updated and user.opcode != "tuple":
                return whole
    return min(whole, total)


def _size(arrays: tuple[Array, ...]) -> int:
    return sum(array.size for array in arrays if array.in_hbm)
