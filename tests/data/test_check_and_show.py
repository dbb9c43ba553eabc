"""`python -m storm_jax.data`: what check finds before training does, and what show draws."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "storm_jax.data", *arguments],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "nowhere"},  # a device would be an error
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def config(train: pathlib.Path, *more: str) -> list[str]:
    return ["--config=configs/tiny.py:stage=sft", f"--config.data.train[0].path={train}", *more]


@pytest.fixture
def broken(shapes_folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The built-in task with a bad record, a missing file, a broken one and an answer that is cut."""
    records = json.loads((shapes_folder / "train.json").read_text())[:20]
    for record in records:
        kind = "video" if "video" in record else "image"
        record[kind] = str(shapes_folder / record[kind])
    videos = [record for record in records if "video" in record]
    videos[0]["video"] = "missing.mp4"
    videos[1]["video"] = "broken.mp4"
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    videos[2]["conversations"][1]["value"] = "red " * 600
    records.insert(3, {"id": "no conversation"})
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_check_reports_what_training_would_meet(
    broken: pathlib.Path, shapes_folder: pathlib.Path, tmp_path: pathlib.Path
):
    out = tmp_path / "report"
    tokenizer = f"--config.data.tokenizer={shapes_folder}/tokenizer"
    done = call("check", *config(broken, tokenizer), f"--out={out}", "--read_media=-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "21 samples, 20 used, 3 unusable" in done.stdout
    for cause in ("1 empty_conversation", "1 missing", "1 unreadable"):
        assert cause in done.stdout
    assert f"{broken} line 4, record 3: " in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("shapes  "))
    assert row.split()[-2:] == ["1", "100.0%"]  # one answer is cut
    assert "rows of 384 tokens and 64 frames" in done.stdout and "of frame slots" in done.stdout
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line["cause"] for line in skipped} == {"empty_conversation", "missing", "unreadable"}
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")

    strict = call(
        "check", *config(broken, tokenizer, "--config.data.max_skip_fraction=0.0"), f"--out={out}"
    )
    assert strict.returncode == 1
    assert "training would stop: data source 'shapes' has 2 unusable" in strict.stdout

    gone = call("check", *config(tmp_path / "none.json", tokenizer), f"--out={out}")
    assert gone.returncode == 1 and gone.stderr == ""
    assert f"training would stop: {tmp_path}/none.json is missing" in gone.stdout


def test_show_draws_a_sample_and_lists_its_tokens(
    shapes_folder: pathlib.Path, tmp_path: pathlib.Path
):
    records = json.loads((shapes_folder / "train.json").read_text())
    index = next(i for i, record in enumerate(records) if "video" in record)
    answer = records[index]["conversations"][1]["value"]
    arguments = config(shapes_folder / "train.json", "--config.data.frames.time_text=per_group")
    done = call("show", *arguments, f"--out={tmp_path}", f"--index={index}")
    assert (done.returncode, done.stderr) == (0, "")
    text, picture = done.stdout.split()
    assert pathlib.Path(picture).read_bytes().startswith(b"\x89PNG")
    lines = pathlib.Path(text).read_text().splitlines()
    assert records[index]["id"] in lines[0] and f"record {index}" in lines[0]
    assert "16 frames at 0.00, " in lines[2]
    learned = "".join(eval(line[25:]) for line in lines if line[20:24].strip() == "*")
    assert learned == f"{answer}<|im_end|>"
    assert sum("visual tokens of medium 0]" in line for line in lines) == 4

    wrong = call("show", *arguments, f"--out={tmp_path}", "--index=9999")
    assert wrong.returncode == 1 and "--index=9999: shapes has 64 samples" in wrong.stderr
    wrong = call("show", *arguments, f"--out={tmp_path}", "--source=other")
    assert wrong.returncode == 1 and "--source=other is none of data.train: shapes" in wrong.stderr


def test_a_command_is_needed():
    refused = call("--config=configs/tiny.py:stage=sft")
    assert refused.returncode != 0 and "say `check` or `show`" in refused.stderr + refused.stdout
