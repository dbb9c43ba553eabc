"""Plans which samples go into which row of which step, from their lengths alone.

    TrainPlan   endless; step t is the same for every process and worker, and after a restart
    EvalPlan    every sample once, in order

All rows of a step have one shape, so the step is compiled once per shape. At the end of a window, rows of a
shape that do not fill a step move to the next larger shape, and those of the largest to the next window.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from storm_jax.data.mixture import Mixture, Ref
from storm_jax.data.packing import plan_rows, smallest_fit

PlannedRow = list[Ref]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The rows of one step; `shape` is the index of their shape in `data.rows`."""

    shape: int
    rows: Sequence[PlannedRow]


class Plan(Protocol):
    """Random access to planned steps."""

    def __getitem__(self, step: int) -> StepPlan: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Window:
    """The steps of one window. `carried` are rows left over by the previous one, `left` by this one."""

    number: int
    first_step: int
    carried: list[PlannedRow]
    steps: list[StepPlan]
    left: list[PlannedRow]


class TrainPlan:
    """The steps of a mixture's endless stream.

    Args:
      state: result of `state()` to resume from; earlier steps are then unavailable.
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
        """Returns the steps of the first window that has any."""
        self._window_of(0)
        return next(window.steps for window in self._windows if window.steps)

    def state(self, step: int) -> dict[str, Any]:
        """Returns plain JSON from which a plan resumes at `step`."""
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
                # Prefetched steps may be windows ahead of the step that is saved.
                self._windows.append(self._plan(last.number + 1, first, last.left))
            for window in reversed(self._windows):
                if step >= window.first_step:
                    return window
        raise IndexError(f"step {step} is before the first step of this plan")

    def forget(self, step: int) -> None:
        """Frees the windows before that of `step`."""
        with self._lock:
            while len(self._windows) > 1 and self._windows[1].first_step <= step:
                self._windows.pop(0)

    def _plan(self, number: int, first_step: int, carried: list[PlannedRow]) -> _Window:
        mixture = self._mixture
        rng = np.random.default_rng([mixture.seed, number, 2])
        refs = mixture.draw(number)
        lengths = mixture.lengths(refs)
        rows = plan_rows(lengths, range(len(refs)), mixture.shapes)
        # Shuffle: first fit closes rows of long samples early, so they would all come first.
        planned = [[refs[i] for i in rows[k]] for k in rng.permutation(len(rows))]
        by_shape = _by_shape(mixture, [*carried, *planned])
        steps: list[StepPlan] = []
        left: list[PlannedRow] = []
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
    """Every sample of every source once, in order. The last step of a shape may have fewer rows."""

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


def _by_shape(mixture: Mixture, rows: Sequence[PlannedRow]) -> list[list[PlannedRow]]:
    """Groups rows by the first shape that they fit."""
    if not rows:
        return [[] for _ in mixture.shapes]
    refs = [ref for row in rows for ref in row]
    starts = np.cumsum([0, *(len(row) for row in rows)])[:-1]
    totals = np.add.reduceat(mixture.lengths(refs), starts, axis=0)
    found: list[list[PlannedRow]] = [[] for _ in mixture.shapes]
    for row, shape in zip(rows, smallest_fit(totals, mixture.shapes), strict=True):
        found[shape].append(row)
    return found
