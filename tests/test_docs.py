"""The documents say what is there: their examples parse, their files and commands exist."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from configs import tiny
from storm_jax.data.records import parse_record

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_examples_of_the_data_guide_are_samples():
    examples = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    samples = [parse_record(json.loads(text), pathlib.Path(), 0) for text in examples]
    assert [len(sample.media) for sample in samples] == [1, 1, 0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:storm_jax|configs|docs|tests)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_scripts_and_flags_that_exist(document):
    config = tiny.get_config("stage=sft")
    files = {f"{name}.py": f"{name}.py" for name in ("train", "eval", "predict")}
    files["-m storm_jax.weights"] = "storm_jax/weights/__main__.py"
    sources = {name: (ROOT / path).read_text() for name, path in files.items()}
    commands = re.findall(r"python (\w+\.py|-m storm_jax\.weights)(.*)", document.read_text())
    for script, arguments in commands:
        for flag in re.findall(r"--(\w[\w.]*)", arguments):
            if flag.startswith("config."):
                node = config
                for name in flag.split(".")[1:]:
                    node = node[name]
            else:
                assert f'"{flag}"' in sources[script], (script, flag)


def test_make_demo_runs_the_commands_of_the_quickstart():
    recipe = (ROOT / "Makefile").read_text().replace("$(RUN)", "python")
    recipe = recipe.replace("$(FAMILIES)", re.search(r"FAMILIES := (\S+)", recipe)[1])
    quickstart = (ROOT / "docs/quickstart.md").read_text()
    commands = re.findall(r"^\tpython (.*)$", recipe.split("\ndemo:")[1].split("\n\n")[0], re.M)
    assert len(commands) == 6
    for command in commands:
        assert command.split(" --require")[0] in quickstart, command
