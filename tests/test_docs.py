"""The documentation is true: examples work, files, flags and commands exist."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import pytest
from media_files import barcode, write_numbered
from PIL import Image

from configs import tiny
from storm_jax import command_line
from storm_jax.config import RunConfig, SourceConfig, StreamSettings, from_dict
from storm_jax.data.mixture import open_mixture
from storm_jax.data.pipeline import batches
from storm_jax.data.plan import EvalPlan
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.text.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_examples_of_the_data_guide_train(small_config, shapes_folder, tmp_path):
    """Each example is read verbatim, with media files of those names."""
    examples = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    assert len(examples) == 5
    (tmp_path / "media/frames").mkdir(parents=True)
    write_numbered(tmp_path / "media/clip-1.mp4", 20)
    write_numbered(tmp_path / "media/wave.gif", 10, "gif", pix_fmt="rgb8")
    for i, name in enumerate(("a.png", "b.png", "photo-7.jpg", "frames/1.png", "frames/2.png")):
        Image.fromarray(barcode(i)).save(tmp_path / "media" / name)
    records = [json.loads(text) for text in examples]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = small_config(data__rows=[{"tokens": 400, "frames": 64}])
    tokenizer = load_tokenizer(shapes_folder / "tokenizer")
    sources = [SourceConfig(name="examples", path=str(tmp_path / "train.jsonl"))]
    mixture = open_mixture(config, sources, tokenizer, WorkerPool(0))
    reader = MediaReader(WorkerPool(0), 32, config.data.frames)
    (batch,) = batches(mixture, EvalPlan(mixture, 4), range(1), range(4), reader)
    assert mixture.skips == batch.skips == []
    assert sorted(batch.sample_ids) == sorted(record["id"] for record in records)
    assert batch.arrays["frame_clip"].max() >= 4


def test_the_mixture_of_the_data_guide_is_a_configuration():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    config = from_dict(RunConfig, names["get_config"]("stage=sft"))
    assert [source.name for source in config.data.train] == ["talks", "photos", "films"]


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
    files |= {
        f"-m storm_jax.{name}": f"storm_jax/{name}/__main__.py"
        for name in ("weights", "data", "preflight", "serve")
    }
    sources = {name: (ROOT / path).read_text() for name, path in files.items()}
    for name, source in sources.items():
        if "define_compression_flags" in source:
            sources[name] += " ".join(f'"{flag}"' for flag in command_line.COMPRESSION)
        if "define_process_flags" in source:
            sources[name] += " ".join(f'"{flag}"' for flag in command_line.PROCESS_FLAGS)
        if "define_stream_flags" in source:
            sources[name] += " ".join(f'"{f.name}"' for f in dataclasses.fields(StreamSettings))
    commands = re.findall(
        r"python (\w+\.py|-m storm_jax\.(?:weights|data|preflight|serve)(?= ))(.*)",
        document.read_text(),
    )
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
    assert len(commands) == 7
    for command in commands:
        assert command.split(" --require")[0] in quickstart, command
