"""The run folder: paths in its configuration are absolute, so that it can be used from anywhere."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from storm_jax.config import ConfigError
from storm_jax.run import Run, RunError

ROOT = pathlib.Path(__file__).parents[1]
RELATIVE = {
    "data__train": [{"name": "shapes", "path": "data/train.json"}],
    "data__val": [{"name": "shapes", "path": "data/val.json", "media_root": "data"}],
    "data__tokenizer": "data/tokenizer",
    "init_from": "runs/align",
    "train__steps": 2,
    "train__eval_every": 0,
}


@pytest.fixture
def run(small_config, shapes_folder, trained_run, tmp_path, monkeypatch) -> Run:
    """A run of two steps that was started from tmp_path with relative paths."""
    (tmp_path / "data").symlink_to(shapes_folder)
    monkeypatch.chdir(tmp_path)
    run = Run("runs/sft")
    run.prepare(small_config(**RELATIVE), pathlib.Path("data/tokenizer"))
    shutil.copytree(trained_run / "checkpoints", run.checkpoints.path)
    return run


def test_paths_are_stored_absolute_and_empty_ones_stay_empty(run, tmp_path):
    config = run.config
    assert config.data.train[0].path == str(tmp_path / "data/train.json")
    assert config.data.train[0].media_root == config.data.index_dir == ""
    assert config.data.val[0].path == str(tmp_path / "data/val.json")
    assert config.data.val[0].media_root == str(tmp_path / "data")
    assert config.data.tokenizer == str(tmp_path / "data/tokenizer")
    assert config.init_from == str(tmp_path / "runs/align")
    assert json.loads((run.path / "config.json").read_text())["init_from"] == config.init_from


def test_the_same_command_resumes_from_the_same_folder_only(
    run, small_config, tmp_path, monkeypatch
):
    run.prepare(small_config(**RELATIVE), run.tokenizer_path)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(
        RunError, match=r"init_from: '\S+/runs/align' there, '\S+/other/runs/align'"
    ):
        run.prepare(small_config(**RELATIVE), run.tokenizer_path)


def test_a_run_of_an_earlier_version_with_relative_paths_resumes(run, small_config, tmp_path):
    path = run.path / "config.json"
    path.write_text(path.read_text().replace(f"{tmp_path}/", ""))
    (run.path / "digests.json").unlink()
    old = Run(run.path)
    assert old.config.data.train[0].path == "data/train.json"
    assert old.config.init_from == "runs/align"
    old.prepare(small_config(**RELATIVE), run.tokenizer_path)
    assert old.config.data.train[0].path == str(tmp_path / "data/train.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json"])
def test_a_changed_file_of_the_run_is_named(run, small_config, name, monkeypatch):
    path = run.path / name
    path.write_text(path.read_text() + "\n")

    def use() -> None:
        found = Run(run.path)
        assert found.config and found.tokenizer()

    problem = f"{name} has changed since it was written: restore it .* or, .* remove .*digests.json"
    with pytest.raises((ConfigError, RunError), match=problem):
        use()
    with pytest.raises((ConfigError, RunError), match=problem):  # resumed, it would be accepted
        Run(run.path).prepare(small_config(**RELATIVE), run.tokenizer_path)
    monkeypatch.setenv("STORM_VERIFY", "0")
    use()


def test_a_run_is_evaluated_from_any_folder(run, tmp_path):
    """eval.py finds the test clips next to the training data."""
    (tmp_path / "other").mkdir()
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "eval.py"), f"--workdir={run.path}", "--benchmark=shapes",
            "--limit=2",
        ],
        cwd=tmp_path / "other",
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (run.path / "evals/shapes/step2_frames8_k2_p1_s1_limit2/results.json").exists()


def test_file_helpers_need_the_standard_library_only():
    """Programs that only write JSON import neither jax nor orbax."""
    code = "import sys, runpy; runpy.run_path('storm_jax/files.py'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"jax", "orbax", "numpy", "transformers"} & set(done.stdout.split())


# The lock.


def test_a_second_training_is_refused_and_names_the_first(tmp_path):
    with Run(tmp_path / "run").locked():
        message = f"is in use by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(RunError, match=message), Run(tmp_path / "run").locked():
            pass
        (tmp_path / "run/config.json").write_text("{}")
    with Run(tmp_path / "run").locked():
        pass


def test_the_lock_of_a_killed_process_is_free_and_its_temporary_files_are_removed(tmp_path):
    hold = (
        "import sys, time; from storm_jax.run import Run\n"
        "with Run(sys.argv[1]).locked(): print('locked', flush=True); time.sleep(60)"
    )
    run = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(run)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"locked\n"
    with pytest.raises(RunError, match=f"process {child.pid}"), Run(run).locked():
        pass
    child.kill()
    child.wait()
    (run / "tokenizer.12.tmp").mkdir()
    (run / "config.json.12.ab.tmp").write_text("{")
    with Run(run).locked():
        assert [path.name for path in run.iterdir()] == ["lock"]
    assert not run.exists()  # nothing was written


def test_checkpoints_in_another_folder_are_found_through_the_run(
    run, small_config, tmp_path, monkeypatch
):
    (run.path / "metrics.jsonl").write_text('{"step": 2}\n')
    config = small_config(**RELATIVE, train__checkpoint_dir="elsewhere")
    with pytest.raises(RunError, match=r"elsewhere does not have checkpoint 2 of this run: copy"):
        run.prepare(config, run.tokenizer_path)
    shutil.move(run.checkpoints.path, tmp_path / "elsewhere")
    run.prepare(config, run.tokenizer_path)
    monkeypatch.chdir("/")
    found = Run(run.path).checkpoints
    assert os.fspath(found.path) == str(tmp_path / "elsewhere")
    assert found.steps() == [2]
    found.verify(2)


def test_a_new_run_does_not_take_the_checkpoints_of_another(run, small_config):
    config = small_config(**RELATIVE, train__checkpoint_dir=str(run.checkpoints.path))
    with pytest.raises(RunError, match="checkpoints contains checkpoints of another run"):
        Run("runs/other").prepare(config, run.tokenizer_path)


def test_a_bucket_needs_its_package(run, small_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    config = small_config(**RELATIVE, train__checkpoint_dir="gs://bucket/run")
    with pytest.raises(RunError, match="gs://bucket/run needs gcsfs: pip install gcsfs"):
        run.prepare(config, run.tokenizer_path)
