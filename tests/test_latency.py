"""The benchmarks of latency and training, and what compression saves, without a clock."""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import accelerator, latency, models, start, training
from benchmarks.torch_models import torch_decoder
from configs import storm_qwen2_7b
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import ModelConfig, RunConfig, from_dict
from storm_jax.flops import encode_work, prefill_work


def flops_of_an_answer(model: ModelConfig, frames: int, name: str) -> dict[str, float]:
    """FLOPs until the first token, by part."""
    compression = models.COMPRESSIONS[name]
    config = from_dict(RunConfig, storm_qwen2_7b.get_config("stage=sft"))
    config = dataclasses.replace(config, model=model)
    clip = plan_clip(frames, Grid.of(model), compression)
    tokens = clip.num_tokens + models.TEXT
    encoded = encode_work(config, 1, frames, VisualShape(clip.num_groups, (1,)))
    prefill = sum(part.forward for part in prefill_work(config, 1, tokens, tokens).values())
    return {name: part.forward for name, part in encoded.items()} | {"prefill": prefill}


def test_the_small_preset_divides_its_flops_like_the_7b_model():
    small, large = (
        flops_of_an_answer(models.PRESETS[name], 128, "1x")
        for name in ("storm_small", "storm_qwen2_7b")
    )
    for part, value in large.items():
        share = value / sum(large.values())
        assert small[part] / sum(small.values()) == pytest.approx(share, rel=0.1), part


@pytest.mark.parametrize(("name", "tokens", "largest"), [("4x", 1 / 4, 0.42), ("8x", 1 / 8, 0.35)])
def test_compression_saves_at_least_what_the_paper_measured(name, tokens, largest):
    """Table 13: at 128 frames, latency falls to 42 % and 35 %."""
    model = models.PRESETS["storm_qwen2_7b"]
    full, compressed = (flops_of_an_answer(model, 128, each) for each in ("1x", name))
    assert sum(compressed.values()) < largest * sum(full.values())
    assert compressed["prefill"] < 1.1 * tokens * full["prefill"]
    assert full["projector"] < 0.03 * sum(full.values())


@pytest.fixture
def tiny(small_model, monkeypatch):
    """Runs the benchmarks with a model of a few thousand parameters."""
    monkeypatch.setitem(models.PRESETS, "storm_small", small_model)


def test_latencies_of_both_models(tiny, tmp_path, capsys):
    latency.main([f"--out={tmp_path}", "--frames=2,8", "--rounds=1"])
    found = json.loads((tmp_path / "latency.json").read_text())
    assert [(row["frames"], row["compression"]) for row in found["rows"]] == [
        (2, "1x"),
        (8, "1x"),
        (8, "4x"),
        (8, "8x"),
    ]
    for row in found["rows"]:
        assert row["storm"].keys() - row["torch"].keys() == {"projector"}
        assert row["storm"]["total"] > 0 < row["torch"]["total"]
    visual = [row["tokens"] - models.TEXT for row in found["rows"][1:]]
    assert visual[0] == 4 * visual[1] == 8 * visual[2]
    assert (tmp_path / "latency.png").stat().st_size > 1000
    for row in found["rows"]:
        assert row["bytes"]["storm"] > 0 and row["bytes"]["torch"] is None  # measured on GPUs only
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 4


@pytest.mark.parametrize("works", [True, False])
def test_ratios_are_to_the_faster_of_eager_and_compiled_torch(
    works, tiny, tmp_path, monkeypatch, capsys
):
    """Compilation, which takes long, is replaced."""

    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nat a long path")

    monkeypatch.setattr(torch, "compile", lambda model: model if works else fail)
    latency.main([f"--out={tmp_path}", "--frames=4", "--rounds=1", "--torch-compile"])
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [set(row.get("compiled", ())) for row in rows] == [
        {"vision", "prefill", "total", "spread"} if works else set()
    ] * 2
    reason = "without torch.compile: RuntimeError: no C++ compiler\n"
    assert (reason in capsys.readouterr().out) != works
    slow = {"vision": 2.0, "prefill": 2.0, "total": 4.0, "token": 2.0, "spread": 0.0}
    row = {
        "frames": 4,
        "compression": "1x",
        "tokens": 9,
        "storm": {"projector": 1.0, **dict.fromkeys(slow, 1.0)},
        "torch": slow,
        "compiled": {"vision": 4.0, "prefill": 1.0},
        "bytes": {"storm": 1, "torch": 2e9},
    }
    assert latency.table([row]).split()[-6:-2] == ["0.50", "1.00", "0.50", "2.00"]


def test_torch_takes_bfloat16_weights(small_model):
    """As those of the large presets."""
    config = dataclasses.replace(small_model, dtype="bfloat16")
    params = jax.device_get(models.random_params(config))
    assert params["decoder/embedding"].dtype == jnp.bfloat16
    decoder = torch_decoder(config.decoder, params)
    weight = decoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(weight, params["decoder/embedding"].astype(np.float32))


def test_training_steps_of_both_models(tiny, tmp_path, capsys):
    training.main([f"--out={tmp_path}", "--frames=8", "--compress=4x", "--rounds=1"])
    (row,) = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert row["flops"] > 0 and row["seconds"].keys() == {"storm", "torch"}
    assert row["bytes"]["storm"] > 0 and row["bytes"]["torch"] is None  # measured on GPUs only
    assert "TFLOP/s" in capsys.readouterr().out


def test_an_unknown_compression_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        latency.main([f"--out={tmp_path}", "--compress=3x"])
    assert "3x: use some of 1x, 4x, 8x" in capsys.readouterr().err


@pytest.mark.slow
def test_the_parts_for_an_accelerator_are_rehearsed(tmp_path, capsys):
    """So that no minute on one is lost to a mistake."""
    accelerator.main([f"--out={tmp_path}", "--rehearse", "--minutes=20"])
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert [(part["part"], part["ended"]) for part in parts] == [
        (part.name, "done") for part in accelerator.PARTS
    ]


def test_parts_that_fail_lack_packages_or_run_late_do_not_stop_the_next(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    (tmp_path / "endless.py").write_text(
        "import subprocess, sys, time\n"
        "if sys.argv[1] != 'inner':\n"
        "    subprocess.run([sys.executable, __file__, 'inner'])\n"
        "for _ in range(60):\n"
        "    print('.', flush=True)\n"
        "    time.sleep(0.5)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = (
        accelerator.Part("fails", "broken"),
        accelerator.Part("lacks", "broken", needs=("no_such_package",)),
        accelerator.Part("late", "endless"),
    )
    found = [accelerator.run(part, tmp_path, False, 2.0)["ended"] for part in parts]
    late = "stopped at the time limit"
    assert found == ["failed with 3", "left out: no no_such_package", late]
    written = (tmp_path / "late.log").read_text()
    time.sleep(1.5)
    assert written and (tmp_path / "late.log").read_text() == written  # its own program has ended


@pytest.mark.slow
def test_the_first_answer_of_a_process(trained_run, shapes_folder, tmp_path, capsys):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    start.main([f"--workdir={trained_run}", f"--video={video}", "--rounds=1", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "start.json").read_text())["seconds"]
    assert found.keys() == {"cold", "warm"}
    assert all(tuple(each) == start.PARTS for rounds in found.values() for each in rounds)
    assert len(capsys.readouterr().out.splitlines()) == 3
