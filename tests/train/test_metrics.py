"""Metrics survive kills and continuations, and can be looked at."""

from __future__ import annotations

import json

from storm_jax.files import read_lines
from storm_jax.train.metrics import MetricsWriter, Progress, duration, plot_curves


def test_a_continued_run_drops_steps_it_will_run_again(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = MetricsWriter(tmp_path, 3, tensorboard=False)
    writer.write(4, {"loss": 40.0})
    writer.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_tensorboard_is_written_when_asked(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_curves_are_drawn_from_the_metrics(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0, "accuracy": 0.1, "grad_norm": 1.0},
        {"step": 1, "val_loss": 1.5, "val_accuracy": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_curves(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_progress_shows_step_loss_speed_and_time_left(capsys):
    progress = Progress(0, 20, log_every=10)
    for step in range(1, 21):
        progress.report(step, {"loss": 1.0, "accuracy": 0.5, "tokens": 100.0})
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert "10/20" in shown[0]
    assert "loss 1.0000" in shown[0]
    assert "tokens/s" in shown[0]
    assert "0:00 left" in shown[1]


def test_durations_read_like_clocks():
    assert [duration(s) for s in (5, 125, 3725)] == ["0:05", "2:05", "1:02:05"]
