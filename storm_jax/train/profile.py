"""Traces steps of a training with jax.profiler."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator

import jax

from storm_jax import distributed


class StepProfile:
    """Marks every step, and traces some of them into a folder that xprof, TensorBoard and Perfetto open.

    Process 0 traces, itself and its own devices.

    Args:
      steps: those to trace; they follow each other.
      settle: waits until the device has finished the steps before. The trace then holds these steps, whole, and no
        others.
      report: prints a line.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        steps: range,
        settle: Callable[[], None],
        report: Callable[[str], None],
    ):
        self._folder, self._steps, self._settle, self._report = folder, steps, settle, report
        self._is_open = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The block is a step."""
        if number in self._steps and number - 1 not in self._steps:
            self._settle()
            self._open()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number in self._steps and number + 1 not in self._steps:
            self._settle()
            self.close()

    def _open(self) -> None:
        if distributed.is_main():
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python: slow, and larger than the rest
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._is_open = True

    def close(self) -> None:
        """Writes the trace if one is open: a training may end within these steps."""
        if self._is_open:
            self._is_open = False
            try:
                jax.profiler.stop_trace()
            except (
                RuntimeError,
                OSError,
            ) as error:  # such as a full disk; the training matters more
                logging.warning("the profile was not written to %s: %s", self._folder, error)
            else:
                self._report(f"profile: {self._folder}")
