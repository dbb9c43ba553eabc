"""The wheel works by itself: in an empty environment, in another folder, without PYTHONPATH."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import storm_jax

ROOT = pathlib.Path(__file__).parents[1]
ASK = """
import importlib.metadata, pathlib, sys
import storm_jax

assert "site-packages" in storm_jax.__file__, storm_jax.__file__
assert importlib.metadata.version("storm-jax") == storm_jax.__version__
points = importlib.metadata.entry_points(group="lmms_eval.models")
assert "storm_jax" in points.names
print(storm_jax.load(sys.argv[1]).answer(sys.argv[2], "Which flash came first?"))
"""


def test_the_version_is_that_of_the_citation():
    assert f"version: {storm_jax.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{storm_jax.__version__}}}" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_answers_a_question_in_an_empty_environment(trained_run, shapes_folder, tmp_path):
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}

    def call(*command: str | pathlib.Path, cwd: pathlib.Path = elsewhere) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("git", "clone", "--quiet", ROOT, clone)
    call(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, clone
    )
    (wheel,) = tmp_path.glob("storm_jax-*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    call(python, "-m", "pip", "install", "--quiet", wheel)
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    answer = call(python, "-c", ASK, trained_run, video)
    assert answer.strip() == storm_jax.load(trained_run).answer(video, "Which flash came first?")
