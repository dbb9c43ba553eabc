"""The commands of docs/weights.md as users call them: import, train, predict, export, import again."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from forked import run_forked
from reference_models import make_decoder, make_tokenizer, make_tower, save

from storm_jax.run import Run
from storm_jax.weights import WeightsError, hub

ROOT = pathlib.Path(__file__).parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


WRONG_CALLS = [
    (["--out=o"], "the command must be `import`, `export` or `push`"),
    (["import", "export", "--out=o"], "the command must be `import`, `export` or `push`"),
    (["import", "--vision=v", "--out=o"], "import needs --config, --decoder"),
    (["export", "--out=o"], "export needs --workdir"),
    (
        ["export", "--workdir=nowhere", "--out=o"],
        r"storm_jax.weights: .*nowhere.* does not exist: .* is not a run",
    ),
    (["export", "--workdir=w"], "export needs --out"),
    (["export", "--workdir=w", "--out=o", "--format=zip"], "folders|hf"),
    (["push", "--folder=f"], "push needs --repo"),
    (
        ["push", "--folder=nowhere", "--repo=a/b"],
        "nowhere is not a folder that `export --format=hf`",
    ),
]


@pytest.fixture(scope="module")
def calls() -> list[subprocess.CompletedProcess]:
    """`--help`, then each of the wrong calls."""
    modules = ["storm_jax.weights.importer", "storm_jax.weights.exporter"]
    return run_forked("storm_jax.weights", modules, [["--help"], *(c for c, _ in WRONG_CALLS)])


def test_help_shows_both_commands(calls):
    assert "python -m storm_jax.weights import --vision" in calls[0].stdout
    assert "python -m storm_jax.weights export --workdir" in calls[0].stdout


@pytest.mark.parametrize("number", range(len(WRONG_CALLS)))
def test_a_wrong_call_is_explained(number, calls):
    refused, problem = calls[1 + number], WRONG_CALLS[number][1]
    assert refused.returncode != 0
    assert re.search(problem, refused.stdout + refused.stderr)
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_from_public_weights_to_a_shared_model(shapes_folder, tmp_path):
    """All commands in order, with a decoder that the configuration does not describe."""
    vision = save(make_tower(image_size=32, patch_size=8), tmp_path / "tower")
    decoder = save(make_decoder("llama3"), tmp_path / "llama")
    made = make_tokenizer("llama3")
    made.save_pretrained(decoder)
    config = "--config=configs/tiny.py:stage=sft"
    run, tuned, out = tmp_path / "run", tmp_path / "tuned", tmp_path / "out"

    done = call(
        "-m", "storm_jax.weights", "import", f"--vision={vision}", f"--decoder={decoder}",
        config, f"--out={run}", "--config.model.vision.feature_layer=-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"Train with --config.init_from={run}" in done.stdout

    video = next((shapes_folder / "media/test").glob("*.mp4"))
    question = (f"--video={video}", "--question=What?", "--max_new_tokens=4")
    asked = call("predict.py", f"--workdir={run}", *question)
    assert asked.returncode == 0, asked.stderr

    trained = call(
        "train.py", config, f"--workdir={tuned}", f"--config.init_from={run}",
        f"--config.data.train[0].path={shapes_folder}/train.json", "--config.train.eval_every=0",
        "--config.train.steps=2", "--config.train.batch_size=2",
        "--config.model.decoder.lora.rank=4",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert f"model.decoder.width=56 of {run} replaces 96" in trained.stdout
    assert Run(tuned).config.model.decoder.qkv_bias is False

    contradicted = call(
        "train.py", config, f"--workdir={tmp_path}/other", f"--config.init_from={run}",
        "--config.model.decoder.width=96",
    )  # fmt: skip
    assert contradicted.returncode == 1
    assert "model.decoder.width=96, not 56" in contradicted.stderr

    done = call("-m", "storm_jax.weights", "export", f"--workdir={tuned}", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((out / "decoder/config.json").read_text())["model_type"] == "llama"

    again = tmp_path / "again"
    done = call(
        "-m", "storm_jax.weights", "import", f"--vision={out}/vision", f"--decoder={out}/decoder",
        f"--projector={out}/projector", config, f"--out={again}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert call("predict.py", f"--workdir={again}", *question).returncode == 0


def test_a_model_that_cannot_be_downloaded_is_one_clear_line(tmp_path):
    refused = call(
        "-m", "storm_jax.weights", "import", "--vision=google/no-such-tower", "--decoder=a/b",
        "--config=configs/tiny.py:stage=align", f"--out={tmp_path}/run",
    )  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "storm_jax.weights: google/no-such-tower is not a local folder, and downloading it"
    )
    assert len(refused.stderr.splitlines()) == 1
    assert "copy the model here" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_hub_ids_and_their_subfolders(tmp_path, monkeypatch):
    asked = {}

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked[repo] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert hub.local_folder("owner/name") == tmp_path
    assert "*.safetensors" in asked["owner/name"] and "*.json" in asked["owner/name"]
    assert hub.local_folder("owner/nvila/vision_tower") == tmp_path / "vision_tower"
    assert "vision_tower/*.safetensors" in asked["owner/nvila"]
    assert hub.local_folder(str(tmp_path)) == tmp_path
    for neither in ("nothing", "./no/such", "/no/such", "~/models"):
        with pytest.raises(WeightsError, match="neither a local folder nor a hub id"):
            hub.local_folder(neither)
