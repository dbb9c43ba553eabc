"""The compiled programs in a trace of jax.profiler, which its ProfileData does not give: read as protocol buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Operation = tuple[str, str]  # program, instruction

_CONTROL = {
    b"while",
    b"conditional",
    b"call",
}  # their time is that of the instructions that they call


def scopes(trace: bytes) -> dict[Operation, str]:
    """The named scopes and primitive of each instruction but control flow, "jit(step)/jvp(vision)/dot_general".

    Instructions that XLA gave none have those of the loop or call that they are in.
    """
    found: dict[Operation, str] = {}
    for plane in _inside(trace, 1):  # XSpace.planes
        if b"/host:metadata" in _inside(plane, 2):
            for program in _inside(plane, 4, 2):  # XPlane.event_metadata, its values
                (name,) = _inside(program, 2)
                # XEventMetadata.stats, XStat.bytes_value, HloProto.hlo_module
                for module in _inside(program, 5, 6, 1):
                    for instruction, scope in _scopes_of_module(module).items():
                        found[name.decode(), instruction] = scope
    return found


def _scopes_of_module(module: bytes) -> dict[str, str]:
    own: dict[str, tuple[str, int]] = {}  # scope and computation of each instruction
    callers: dict[int, tuple[str, int]] = {}  # the same of the instruction that calls a computation
    for computation in _inside(module, 3):
        (number,) = _inside(computation, 5)
        for instruction in _inside(computation, 2):
            values = dict(_fields(instruction))
            scope = b"".join(_inside(values.get(7, b""), 2)).decode()  # OpMetadata.op_name
            for called in _varints(values.get(38, b"")):
                callers[called] = (scope, number)
            if values[2] not in _CONTROL:
                own[values[1].decode()] = (scope, number)

    def resolved(scope: str, number: int) -> str:
        return scope or (resolved(*callers[number]) if number in callers else "")

    return {name: resolved(*each) for name, each in own.items()}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number and value of each field of a message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        else:
            size, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(message, at)
            at += size
            yield key >> 3, message[at - size : at]


def _inside(message: bytes, *path: int) -> Iterator[Any]:
    """The values at a path of field numbers."""
    for number, value in _fields(message):
        if number == path[0]:
            yield from _inside(value, *path[1:]) if path[1:] else [value]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def _varints(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value
