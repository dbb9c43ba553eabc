"""XLA's own count of FLOPs, with every loop counted as often as it runs.

XLA's cost analysis counts the body of a loop once. Here a program is split at its loops: each piece without
loops is analysed by XLA, and multiplied by how often it runs, at most. Nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def count_flops(jaxpr: ClosedJaxpr) -> float:
    """FLOPs of a traced function, with elementwise operations, but without exponentials and the like."""
    pieces = _Pieces()

    def without_loops(*args: jax.Array) -> tuple[list[Any], list[Any]]:
        return pieces.evaluate(jaxpr.jaxpr, jaxpr.consts, args), pieces.inputs

    cost = jax.jit(without_loops).lower(*jaxpr.in_avals).cost_analysis() or {}
    loops = (times * count_flops(body) for times, body in pieces.loops)
    return cost.get("flops", 0.0) + sum(loops)


class _Pieces:
    """The loops of a function, found while the rest of it is evaluated.

    Attributes:
      loops: how often each runs, and its body.
      inputs: theirs; the piece has to return them, or what computes them would be dropped as unused.
    """

    def __init__(self) -> None:
        self.loops: list[tuple[int, ClosedJaxpr]] = []
        self.inputs: list[Any] = []

    def evaluate(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The results of a function; those of its loops are zeros."""
        values: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        )

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            results = self._apply(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, inputs: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._leave_out(equation, inputs, params["length"], params["jaxpr"])
        if name == "while":
            times = _most_iterations(params["cond_jaxpr"])
            return self._leave_out(equation, inputs, times, params["body_jaxpr"])
        if name == "cond":  # the branch that costs most
            return self._leave_out(equation, inputs, 1, max(params["branches"], key=count_flops))
        called = params.get("jaxpr", params.get("call_jaxpr"))
        if called is not None:  # a call of a function, which is part of the same piece
            if isinstance(called, ClosedJaxpr):
                return self.evaluate(called.jaxpr, called.consts, inputs)
            return self.evaluate(called, (), inputs)
        result = equation.primitive.bind(*inputs, **params)
        return result if equation.primitive.multiple_results else [result]

    def _leave_out(
        self, equation: Any, inputs: list[Any], times: int, body: ClosedJaxpr
    ) -> list[Any]:
        self.loops.append((times, body))
        self.inputs += inputs
        return [jnp.zeros(out.aval.shape, out.aval.dtype) for out in equation.outvars]


def _most_iterations(condition: ClosedJaxpr) -> int:
    """The largest number that the condition of a loop compares its counter with, or 1: counters start at 0."""
    compared = (each.invars for each in condition.jaxpr.eqns if each.primitive.name == "lt")
    numbers = [int(atom.val) for atoms in compared for atom in atoms if isinstance(atom, Literal)]
    return max(numbers, default=1)
