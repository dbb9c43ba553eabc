"""Reads the text of a compiled program: its instructions, and how often each runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]\d?[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_BITS = re.compile(r"(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^\d+$")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array.

    Attributes:
      size: bytes.
      in_hbm: False for the fast memories of a chip, and for host memory.
    """

    dtype: str
    size: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: of the result, in order; a tuple has several.
      operands: names of instructions of the same computation.
      arguments: the text between the parentheses.
      attributes: the text after the operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        branches = _BRANCHES.search(self.attributes)
        return _CALLED.findall(self.attributes) + (_NAME.findall(branches[1]) if branches else [])


Computation = dict[str, Instruction]


class Program:
    """The computations of a compiled program."""

    def __init__(self, text: str):
        self.entry = ""
        self.computations: dict[str, Computation] = {}
        body: Computation = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                body = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif line.startswith("  ") and " = " in line:
                instruction = _parse(line)
                body[instruction.name] = instruction

    def runs(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction outside fusions, with its computation and how often it runs.

        A loop that may end early counts in full, and so do all branches of a conditional.
        """
        yield from self._runs(self.entry, 1)

    def _runs(self, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                times_body = times * self._trips(instruction)
                yield from self._runs(_attribute(instruction, "body"), times_body)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for called in instruction.called:
                    yield from self._runs(called, times)

    def _trips(self, loop: Instruction) -> int:
        """The most iterations of a loop: if they are not known, the largest constant that its condition compares
        with, since loops of JAX count from 0."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        return max(self._constants(_attribute(loop, "condition")), default=1)

    def _constants(self, name: str) -> Iterator[int]:
        for each in self.computations[name].values():
            if each.opcode == "constant" and _CONSTANT.match(each.arguments):
                yield int(each.arguments)
            for called in each.called:
                yield from self._constants(called)


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%([\w.\-]+)", instruction.attributes)
    assert found, f"{instruction.name} has no {name}"
    return found[1]


def _parse(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right) if right.startswith("(") else right.index(" ")
    types, rest = right[:end], right[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest) - 2
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        arrays=tuple(_arrays(types)),
        operands=tuple(_NAME.findall(rest[:close])),
        arguments=rest[:close],
        attributes=rest[close + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _arrays(types: str) -> Iterator[Array]:
    for dtype, sizes, layout in _ARRAY.findall(types):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        yield Array(dtype, math.ceil(count * _bits(dtype) / 8), not re.search(r"S\([1-9]", layout))


@functools.cache
def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = _BITS.search(dtype)  # bf16, f8e4m3fn, s4
    return int(found[1]) if found else 0
