"""Metrics on disk (metrics.jsonl, TensorBoard), on the terminal and as a plot."""

from __future__ import annotations

import logging
import pathlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from storm_jax import distributed
from storm_jax.files import Appender, read_lines, to_line, write_atomically

_RECENT_STEPS = 50  # that speed and time left are averaged over


class MetricsWriter:
    """Appends one JSON line per step to metrics.jsonl, and optionally scalars to TensorBoard.

    Process 0 writes. A resumed run first drops the lines after its checkpoint's step: those steps are repeated.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, tensorboard: bool):
        self.path = workdir / "metrics.jsonl"
        self._lines: Appender | None = None
        self._board: Any = None
        if not distributed.is_main():
            return
        if self.path.exists():
            lines = [line for line in read_metrics(workdir) if line["step"] <= start_step]
            last = lines[-1]["step"] if lines else 0
            if last < start_step:
                logging.warning("%s lost the steps %d to %d", self.path, last + 1, start_step)
            write_atomically(self.path, "".join(map(to_line, lines)))
        self._lines = Appender(self.path)
        if tensorboard:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._lines is not None:
            self._lines.write([to_line({"step": step, **metrics})])
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The undamaged lines of metrics.jsonl."""

    def check(line: dict[str, Any]) -> dict[str, Any]:
        if not all(isinstance(value, int | float) for value in line.values()):
            raise TypeError("not all values are numbers")
        line["step"] = int(line["step"])
        return line

    return read_lines(workdir / "metrics.jsonl", check)


class _Interval(NamedTuple):
    """What a step took and did."""

    seconds: float
    tokens: float
    flops: float


class Progress:
    """Step, loss, accuracy, speed and time left: a bar on a terminal, else a line every `log_every`
    steps.

    Speed and time left are those of recent steps. Intervals in which something else took time
    (compilation, validation, saving) do not count.

    Args:
      peak: FLOP/s of all devices; if it is known, MFU is shown.
      clock: returns seconds.
    """

    def __init__(
        self,
        start_step: int,
        steps: int,
        log_every: int,
        *,
        peak: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._steps, self._log_every, self._clock = steps, log_every, clock
        self._peak = peak
        self._recent: deque[_Interval] = deque(maxlen=_RECENT_STEPS)
        self._last_update = clock()
        self._skips_interval = False
        self._bar: tqdm.tqdm | None = None
        if sys.stdout.isatty():
            self._bar = tqdm.tqdm(
                total=steps,
                initial=start_step,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{bar} {n_fmt}/{total_fmt}{postfix}",  # with our time left, not tqdm's
            )

    def skip_interval(self) -> None:
        """Excludes the time between the last update and the next one."""
        self._skips_interval = True

    def update(self, step: int, metrics: Mapping[str, float], flops: float) -> None:
        """Shows a finished step. `metrics` has its loss, accuracy and number of tokens.

        Args:
          flops: that the model needs for the step.
        """
        now = self._clock()
        if not self._skips_interval:
            self._recent.append(_Interval(now - self._last_update, metrics["tokens"], flops))
        self._last_update, self._skips_interval = now, False
        values = (
            f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:6.1%}  {self._pace(step)}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._log_every == 0 or step == self._steps:
            print(f"step {step:>6}/{self._steps}  {values}", flush=True)

    def _pace(self, step: int) -> str:
        seconds = sum(each.seconds for each in self._recent)
        if not seconds:
            return "? tokens/s  ? left"
        speed = sum(each.tokens for each in self._recent) / seconds
        left = seconds / len(self._recent) * (self._steps - step)
        mfu = ""
        if self._peak:
            mfu = f"MFU {sum(each.flops for each in self._recent) / seconds / self._peak:.1%}  "
        return f"{speed:,.0f} tokens/s  {mfu}{duration(left)} left"

    def print(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """2:05 or 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_curves(workdir: pathlib.Path) -> pathlib.Path:
    """Plots loss, answer token accuracy and gradient norm of a run to curves.png.

    Per-step values are faint, their moving average (over 1/20 of the steps) is bold.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    lines = read_metrics(workdir)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {
        "loss": ("Loss", "nats per answer token"),
        "accuracy": ("Accuracy", "correct answer tokens"),
        "grad_norm": ("Gradient norm", ""),
    }
    for axis, (name, (title, label)) in zip(axes, panels.items(), strict=True):
        steps, values = _series(lines, name)
        if len(steps):
            axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
            smooth = _moving_average(values, max(1, len(values) // 20))
            axis.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="train")
        steps, values = _series(lines, f"val_{name}")
        if len(steps):
            axis.plot(steps, values, "o-", color="tab:orange", markersize=4, label="validation")
        axis.set_title(title, fontweight="bold")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0, 1.02)
    axes[1].yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, decimals=0))
    axes[2].set_yscale("log")
    path = workdir / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have a key."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    table = np.array(points, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred; windows are shorter at both ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
