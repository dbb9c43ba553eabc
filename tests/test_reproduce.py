"""The commands of docs/reproduce.md's short road, on a small random model and the built-in task."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from families import SmolVLM

from storm_jax.run import Run

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = re.compile(r"configs/storm_qwen2_7b\.py:stage=(\w+)")
# What is smaller here: data, rows, steps. The recipe of the built-in task takes the place of the paper's.
SMALLER = [
    "--config.train.steps=2", "--config.train.batch_size=2", "--config.train.eval_every=0", "--config.data.num_workers=0",
    "--config.compression.num_frames=8", "--config.data.rows[0].frames=16", "--config.mesh.data=1",
]  # fmt: skip


def short_road() -> list[str]:
    text = (ROOT / "docs/reproduce.md").read_text()
    section = text[text.index("## The short road") : text.index("## What is tested")]
    commands = re.findall(r"^    python (.*)$", section, re.MULTILINE)
    return [line for line in commands if "smolvlm2" not in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_short_road(shapes_folder, tmp_path):
    model = SmolVLM(tmp_path / "model").folder
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes_folder)
    commands = short_road()
    assert [line.split()[0] for line in commands] == [
        "-m",
        "eval.py",
        "train.py",
        "train.py",
        "eval.py",
        "-m",
    ]
    for line in commands:
        line = line.replace("Efficient-Large-Model/NVILA-8B-Video", str(model))
        line = line.replace("--benchmark=videomme", "--benchmark=shapes")
        line = line.replace("data/videomme", str(shapes_folder))
        line, is_training = RECIPE.subn(f"{ROOT}/configs/tiny.py:stage=\\1", line)
        script, *flags = shlex.split(line)
        command = [script, *flags] if script == "-m" else [str(ROOT / script), *flags]
        done = subprocess.run(
            [sys.executable, *command, *(SMALLER if is_training else [])],
            cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr[-2000:])
    before, after = (
        Run(tmp_path / f"runs/{name}").config.model for name in ("nvila", "nvila-storm")
    )
    assert (before.mixer, after.mixer) == ("none", "mamba1")
    assert (before.layout, before.stem) == (after.layout, after.stem)
    assert (tmp_path / "shared/nvila-storm/model.safetensors").exists()
