"""Metrics survive interruptions, progress estimates speed and time left, curves are plotted."""

from __future__ import annotations

import io
import json
import sys

from storm_jax.files import read_lines
from storm_jax.train.metrics import MetricsWriter, Progress, duration, plot_curves

METRICS = {"loss": 1.0, "accuracy": 0.5, "tokens": 100.0}
FLOPS = 1e12  # of a step


class Clock:
    """A clock that only advances when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_resumed_run_drops_steps_it_will_repeat(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # interrupted while writing
    writer = MetricsWriter(tmp_path, 3, tensorboard=False)
    writer.write(4, {"loss": 40.0})
    writer.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_lost_steps_are_named(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    MetricsWriter(tmp_path, 4, tensorboard=False).close()
    assert "metrics.jsonl lost the steps 2 to 4" in caplog.text


def test_tensorboard_is_written_on_request(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_curves_are_plotted_from_the_metrics(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0, "accuracy": 0.1, "grad_norm": 1.0},
        {"step": 1, "val_loss": 1.5, "val_accuracy": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_curves(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_progress_prints_step_loss_speed_and_time_left_in_a_log(capsys):
    clock = Clock()
    progress = Progress(0, 20, log_every=10, clock=clock)
    for step in range(1, 21):
        clock.now += 2.0
        progress.update(step, METRICS, FLOPS)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "step     10/20  loss 1.0000  accuracy  50.0%  50 tokens/s  0:20 left",
        "step     20/20  loss 1.0000  accuracy  50.0%  50 tokens/s  0:00 left",
    ]


def test_mfu_is_shown_where_the_peak_is_known(capsys):
    clock = Clock()
    progress = Progress(0, 20, log_every=10, peak=4e12, clock=clock)
    for step in range(1, 11):
        clock.now += 2.0
        progress.update(step, METRICS, FLOPS)
    assert "  50 tokens/s  MFU 12.5%  0:20 left" in capsys.readouterr().out


def test_compilation_and_validation_do_not_count_as_speed(capsys):
    """Row shapes compile at their first step, here 1 and 3; validation follows step 4."""
    clock = Clock()
    progress = Progress(0, 1000, log_every=1, clock=clock)
    for step, seconds in enumerate((60.0, 2.0, 90.0, 2.0, 30.0, 4.0), start=1):
        if seconds > 10:
            progress.skip_interval()
        clock.now += seconds
        progress.update(step, METRICS, FLOPS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("? tokens/s  ? left")
    assert lines[1].endswith(f"50 tokens/s  {duration(998 * 2)} left")
    assert lines[4].endswith(f"50 tokens/s  {duration(995 * 2)} left")
    assert lines[5].endswith(f"38 tokens/s  {duration(994 * 8 / 3)} left")  # 300 tokens in 8 s


def test_time_left_follows_recent_steps(capsys):
    clock = Clock()
    progress = Progress(0, 1000, log_every=500, clock=clock)
    for step in range(1, 501):
        clock.now += 9.0 if step <= 400 else 1.0
        progress.update(step, METRICS, FLOPS)
    assert f"{duration(500)} left" in capsys.readouterr().out


def test_a_terminal_shows_a_bar_with_our_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    clock = Clock()
    progress = Progress(5, 20, log_every=10, clock=clock)
    clock.now += 2.0
    progress.update(6, METRICS, FLOPS)
    progress.print("step      6  val_loss 0.5000")
    progress.close()
    shown = terminal.getvalue()
    assert "5/20" in shown and "step      6  val_loss 0.5000\n" in shown
    assert "6/20, loss 1.0000  accuracy  50.0%  50 tokens/s  0:28 left" in shown


def test_durations_read_like_clocks():
    assert [duration(s) for s in (5, 125, 3725)] == ["0:05", "2:05", "1:02:05"]
