"""The three scripts as users call them: what they print, write and refuse."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from forked import run_forked

ROOT = pathlib.Path(__file__).parents[1]


def call(
    script: str, *arguments: str, path: str = "", stdin: str = ""
) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py"])
def test_help_shows_how_to_call(script):
    shown = call(script, "--help")
    assert f"python {script}" in shown.stdout


WRONG_FIELDS = {
    "--config.model.vision.nope=3": "nope",
    "--config.train.steps=many": "config.train.steps",
    "--config.train.steps=0": "train.steps=0 must be positive",
    "--config.mesh.tensor=3": "mesh.tensor=3 does not divide",
    "--config.compression.num_frames=65": "no video would fit",
    "--config.init_from=nowhere": "nowhere",
    "--config.data.train=()": "data.train is empty: list the sources to train on",
    "--config.data.train[0].cap=-1": "data.train[0].cap=-1 must be at least 0",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> tuple[pathlib.Path, dict[str, subprocess.CompletedProcess]]:
    """A folder for the run, and what train.py says to each of the wrong fields."""
    workdir = tmp_path_factory.mktemp("refused") / "run"
    start = ["--config=configs/tiny.py:stage=sft", f"--workdir={workdir}"]
    calls = [[*start, override] for override in WRONG_FIELDS]
    done = run_forked("train.py", ["storm_jax.train.loop"], calls)
    return workdir, dict(zip(WRONG_FIELDS, done, strict=True))


@pytest.mark.parametrize("override", WRONG_FIELDS)
def test_a_wrong_field_is_reported_before_anything_is_written(override, refused):
    workdir, calls = refused
    assert calls[override].returncode != 0
    assert WRONG_FIELDS[override] in calls[override].stderr
    assert "Traceback" not in calls[override].stderr.split(WRONG_FIELDS[override])[-1]
    assert not workdir.exists()


def test_a_question_about_a_file_is_answered(trained_run, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    answered = call(
        "predict.py", f"--workdir={trained_run}", f"--video={video}", "--question=Which came first?"
    )
    assert answered.returncode == 0, answered.stderr
    assert answered.stderr == ""
    assert answered.stdout.endswith("\n")


def test_questions_are_read_from_standard_input_about_several_files(trained_run, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    command = (
        "predict.py", f"--workdir={trained_run}", f"--video={video}", f"--video={video}",
        "--num_frames=8", "--temporal_pool=4", "--spatial_pool=1", "--max_new_tokens=3",
    )  # fmt: skip
    command = (*command, "--temperature=1", "--seed=-1")
    together = call(*command, stdin="Which came first?\nWhat colour?\n\nNot asked.\n")
    assert (together.returncode, together.stderr) == (0, "")
    alone = call(*command, "--question=Which came first?", "--question=What colour?")
    assert together.stdout == alone.stdout and together.stdout.count("\n") >= 2


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--question=What?"], "--video, --image or --stream is missing"),
        (["--stream=no.mp4"], "--stream=no.mp4 cannot be read: No such file"),
        (["--stream=no.mp4", "--video=no.mp4"], "--stream cannot be combined with --video"),
        (["--image=no.png", "--question=What?"], "image no.png is missing: no such file"),
        (["--image=.", "--question=\udcff"], r"the question .* is not valid UTF-8"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(flags, problem, trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    refused = call("predict.py", f"--workdir={run}", *flags)
    assert refused.returncode == 1
    assert re.fullmatch(rf"predict.py: {problem}.*\n", refused.stderr)


def test_a_file_is_watched_as_it_arrives(trained_run, shapes_folder):
    """Asked every half second of video, or by somebody after its end."""
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    common = (
        "predict.py",
        f"--workdir={trained_run}",
        f"--stream={video}",
        "--fps=8",
        "--budget_tokens=64",
    )
    command = (*common, "--question=Which came first?", "--ask_every=0.5")
    told = call(*command, "--jsonl")
    assert told.returncode == 0, told.stderr
    answers = [json.loads(line) for line in told.stdout.splitlines()]
    assert [answer["time"] for answer in answers] == sorted(answer["time"] for answer in answers)
    assert answers[-1]["frames"] == 8 and answers[-1]["visual_tokens"] > 0
    assert {answer["question"] for answer in answers} == {"Which came first?"}
    assert "8 frames in 0.9 s of video" in told.stderr and "0 frames dropped" in told.stderr
    typed = call(*common, stdin="Which came first?\n\n")
    assert typed.stdout == f"[0.9 s] {answers[-1]['answer']}\n"


@pytest.mark.parametrize("content", [None, b"not a video"], ids=["missing", "broken"])
def test_a_bad_file_is_one_clear_line(content, trained_run, tmp_path):
    video = tmp_path / "bad.mp4"
    if content is not None:
        video.write_bytes(content)
    refused = call("predict.py", f"--workdir={trained_run}", f"--video={video}", "--question=What?")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert re.fullmatch(rf"predict.py: video {video} is .*\n", refused.stderr)


def test_a_folder_without_a_run_is_one_clear_line(tmp_path):
    refused = call("predict.py", f"--workdir={tmp_path}", "--video=a.mp4", "--question=What?")
    assert refused.returncode == 1
    assert re.fullmatch(rf"predict.py: .*{tmp_path}.* is not a run .*\n", refused.stderr)


def test_evaluation_counts_unreadable_media_as_wrong_and_lists_them(
    trained_run, shapes_folder, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(shapes_folder, data)
    records = json.loads((data / "test.json").read_text())
    broken = next(record for record in records if record["family"] == "order")
    (data / broken["video"]).write_bytes(b"")
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    done = call(
        "eval.py",
        f"--workdir={run}",
        "--benchmark=shapes",
        f"--data_root={data}",
        "--temporal_pool=4",
        "--temporal_sample=2",
        "--batch_size=4",
        "--require=order",
    )
    assert done.returncode == 1
    assert done.stderr == "eval.py: not 10% above chance: order\n"
    folder = run / "evals/shapes/step2_frames8_k4_p1_s2"
    results = json.loads((folder / "results.json").read_text())
    assert re.fullmatch("[0-9a-f]{16}", results["config"]) and results["versions"]["jax"]
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?|unknown", results["commit"])
    order = next(group for group in results["groups"] if group["group"] == "order")
    assert order["total"] == 2
    assert order["unanswered"] == 1
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [record["id"] for record in records]
    failed = [line for line in lines if line["error"]]
    assert [line["id"] for line in failed] == [broken["id"]]
    assert not failed[0]["right"]
    assert str(data / broken["video"]) in failed[0]["error"]
    assert (folder / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "order" in done.stdout
    assert "ceiling" in done.stdout


@pytest.mark.slow
def test_the_projector_of_the_extending_guide_trains_and_answers(shapes_folder, tmp_path):
    guide = (ROOT / "docs/extending.md").read_text()
    module, config = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "my_projector.py").write_text(module)
    (tmp_path / "my_config.py").write_text(config)
    workdir = tmp_path / "run"
    trained = call(
        "train.py",
        f"--config={tmp_path}/my_config.py:stage=sft",
        f"--workdir={workdir}",
        f"--config.data.train[0].path={shapes_folder}/train.json",
        f"--config.data.val[0].path={shapes_folder}/val.json",
        "--config.train.steps=2",
        "--config.train.batch_size=2",
        path=str(tmp_path),
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    assert "val_loss" in trained.stdout
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    question = ("predict.py", f"--workdir={workdir}", f"--video={video}", "--question=What?")
    assert call(*question, path=str(tmp_path)).returncode == 0
    without_path = call(*question)
    assert without_path.returncode == 1
    assert without_path.stderr.startswith("predict.py: ") and without_path.stderr.count("\n") == 1
    assert "my_projector" in without_path.stderr
    assert "PYTHONPATH" in without_path.stderr


def test_neither_torch_nor_tensorflow_is_needed_at_run_time(trained_run, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['tensorflow'] = None  # importing them fails\n"
        "import storm_jax, storm_jax.evals.runner, storm_jax.train.loop\n"
        f"storm_jax.load({str(trained_run)!r}).answer({str(video)!r}, 'What?')\n"
    )
    done = call("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
