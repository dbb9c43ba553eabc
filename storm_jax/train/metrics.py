"""Metrics on disk, on the terminal and as a picture."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from storm_jax.files import read_lines, write_lines


class MetricsWriter:
    """Appends one JSON line a step to metrics.jsonl, and scalars to TensorBoard when asked.

    A continued run drops the lines of steps that its checkpoint does not have, since they will be
    run again.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, tensorboard: bool):
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= start_step]
            write_lines(self.path, kept)
        self._file = self.path.open("a")
        self._board: Any = None
        if tensorboard:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class Progress:
    """A line every `log_every` steps: step, loss, accuracy, speed and time left."""

    def __init__(self, start_step: int, steps: int, log_every: int):
        self._start, self._steps, self._every = start_step, steps, log_every
        self._began = self._last = time.monotonic()
        self._tokens = 0.0

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tokens += metrics["tokens"]
        if step == self._start + 1:  # compilation is not speed
            self._began = self._last = time.monotonic()
            self._tokens = 0.0
        if step % self._every and step != self._steps:
            return
        now = time.monotonic()
        speed = self._tokens / (now - self._last)
        per_step = (now - self._began) / max(1, step - self._start - 1)
        left = duration(per_step * (self._steps - step)) if step > self._start + 1 else "?"
        print(
            f"step {step:>6}/{self._steps}  loss {metrics['loss']:.4f}  "
            f"accuracy {metrics['accuracy']:6.1%}  {speed:,.0f} tokens/s  {left} left",
            flush=True,
        )
        self._last, self._tokens = now, 0.0


def duration(seconds: float) -> str:
    """2:05 or 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_curves(workdir: pathlib.Path) -> pathlib.Path:
    """Draws loss, answer-token accuracy and gradient norm of a run to curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_lines(workdir / "metrics.jsonl")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    titles = {
        "loss": "loss (nats)",
        "accuracy": "answer token accuracy",
        "grad_norm": "gradient norm",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for key, style in ((name, {"linewidth": 1}), (f"val_{name}", {"marker": "o"})):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, **style)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[2].set_yscale("log")
    path = workdir / "curves.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
