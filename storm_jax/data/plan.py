"""Which samples stand in which row of which step, decided on lengths alone.

    TrainPlan   endless; step t is the same for every process and worker, and after a restart
    EvalPlan    every sample once, in order

All rows of a step have one shape, so that it is compiled once a shape. Rows of a shape that do not fill
a step at the end of a window go to the next larger shape, and those of the largest to the next window.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from storm_jax.data.mixture import Mixture, Ref
from storm_jax.data.packing import plan_rows, smallest_fit

Row = list[Ref]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The rows of one step: `shape` is a number of `data.rows`."""

    shape: int
    rows: Sequence[Row]


class Plan(Protocol):
    """Random access to the steps of a run."""

    def __getitem__(self, step: int) -> StepPlan: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Window:
    """Where the steps of one window begin, with the rows that the window before left over."""

    number: int
    first_step: int
    carried: list[Row]
    steps: list[StepPlan]
    left: list[Row]


class TrainPlan:
    """The steps of a mixture's endless stream, from the first step of a window on.

    Args:
      state: what `state` gave; the steps before it cannot be asked for.
    """

    def __init__(self, mixture: Mixture, batch_size: int, state: dict[str, Any] | None = None):
        self._mixture, self._batch_size = mixture, batch_size
        self._lock = threading.Lock()
        state = state or {"window": 0, "first_step": 0, "carried": []}
        carried = [[Ref(*ref) for ref in row] for row in state["carried"]]
        self._windows = [self._plan(state["window"], state["first_step"], carried)]

    def __getitem__(self, step: int) -> StepPlan:
        window = self._window_of(step)
        return window.steps[step - window.first_step]

    def first_window(self) -> list[StepPlan]:
        """The steps that are planned together from the first one on."""
        self._window_of(0)
        return next(window.steps for window in self._windows if window.steps)

    def state(self, step: int) -> dict[str, Any]:
        """Plain JSON from which a plan goes on at `step`."""
        window = self._window_of(step)
        return {
            "window": window.number,
            "first_step": window.first_step,
            "carried": [[list(ref) for ref in row] for row in window.carried],
        }

    def _window_of(self, step: int) -> _Window:
        with self._lock:
            while step >= self._windows[-1].first_step + len(self._windows[-1].steps):
                last = self._windows[-1]
                first = last.first_step + len(last.steps)
                # Steps that are decoded ahead may be windows ahead of the one that is saved.
                self._windows.append(self._plan(last.number + 1, first, last.left))
            for window in reversed(self._windows):
                if step >= window.first_step:
                    return window
        raise IndexError(f"step {step} lies before those of this plan")

    def forget(self, step: int) -> None:
        """Frees what is known of the windows before that of `step`."""
        with self._lock:
            while len(self._windows) > 1 and self._windows[1].first_step <= step:
                self._windows.pop(0)

    def _plan(self, number: int, first_step: int, carried: list[Row]) -> _Window:
        mixture = self._mixture
        rng = np.random.default_rng([mixture.seed, number, 2])
        refs = mixture.draw(number)
        lengths = mixture.lengths(refs)
        rows = plan_rows(lengths, range(len(refs)), mixture.shapes)
        # First fit closes rows of long samples early: without this they would come first.
        planned = [[refs[i] for i in rows[k]] for k in rng.permutation(len(rows))]
        by_shape = _by_shape(mixture, [*carried, *planned])
        steps: list[StepPlan] = []
        left: list[Row] = []
        for shape, members in enumerate(by_shape):
            members = [*left, *members]
            full = len(members) // self._batch_size * self._batch_size
            for start in range(0, full, self._batch_size):
                steps.append(StepPlan(shape, members[start : start + self._batch_size]))
            left = members[full:]
        steps = [steps[i] for i in rng.permutation(len(steps))]
        return _Window(
            number=number, first_step=first_step, carried=carried, steps=steps, left=left
        )


class EvalPlan:
    """Every sample of every source once, in order; the last step of a shape may lack rows."""

    def __init__(self, mixture: Mixture, batch_size: int):
        refs = [Ref(n, int(i)) for n, part in enumerate(mixture.parts) for i in part.usable]
        rows = plan_rows(mixture.lengths(refs), range(len(refs)), mixture.shapes)
        by_shape = _by_shape(mixture, [[refs[i] for i in row] for row in rows])
        self._steps = [
            StepPlan(shape, members[start : start + batch_size])
            for shape, members in enumerate(by_shape)
            for start in range(0, len(members), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> StepPlan:
        return self._steps[step]


def _by_shape(mixture: Mixture, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by the first shape that holds them."""
    if not rows:
        return [[] for _ in mixture.shapes]
    refs = [ref for row in rows for ref in row]
    starts = np.cumsum([0, *(len(row) for row in rows)])[:-1]
    totals = np.add.reduceat(mixture.lengths(refs), starts, axis=0)
    found: list[list[Row]] = [[] for _ in mixture.shapes]
    for row, shape in zip(rows, smallest_fit(totals, mixture.shapes), strict=True):
        found[shape].append(row)
    return found
