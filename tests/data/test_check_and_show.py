"""`python -m storm_jax.data`: what `check` reports before training would fail, and what `show` draws."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from forked import run_forked

from configs import tiny
from storm_jax.config import FramesConfig, RunConfig, SourceConfig, TrainedCompression, from_dict
from storm_jax.data.check import check
from storm_jax.data.length_plot import choose_edges
from storm_jax.data.mixture import Ref, open_mixture
from storm_jax.data.show import show
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool


def arguments(train: pathlib.Path, *more: str) -> list[str]:
    return ["--config=configs/tiny.py:stage=sft", f"--config.data.train[0].path={train}", *more]


def config(**data) -> RunConfig:
    """The same configuration in this process, with fields of `data` replaced."""
    base = from_dict(RunConfig, tiny.get_config("stage=sft"))
    return dataclasses.replace(base, data=dataclasses.replace(base.data, num_workers=0, **data))


def source(path: pathlib.Path) -> SourceConfig:
    return SourceConfig(name="shapes", path=str(path))


@pytest.fixture
def broken(shapes_folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The built-in task with a bad record, a missing file, a broken file and an answer that is too long."""
    records = json.loads((shapes_folder / "train.json").read_text())[:20]
    for record in records:
        kind = "video" if "video" in record else "image"
        record[kind] = str(shapes_folder / record[kind])
    videos = [record for record in records if "video" in record]
    videos[0]["video"] = "missing.mp4"
    videos[1]["video"] = "broken.mp4"
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    videos[2]["conversations"][1]["value"] = "red " * 600
    records.insert(3, {"id": "no conversation"})
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_check_reports_bad_samples_and_packing(broken: pathlib.Path, tokenizer, tmp_path, capsys):
    out = tmp_path / "report"
    found = check(config(), [source(broken)], tokenizer, out, read_media=-1)
    printed = capsys.readouterr()
    assert (found.failures, printed.err) == ([], "")
    assert "21 samples, 20 used, 3 unusable" in printed.out
    for cause in ("1 empty_conversation", "1 missing", "1 unreadable"):
        assert cause in printed.out
    assert f"{broken} line 4, record 3: " in printed.out
    row = next(line for line in printed.out.splitlines() if line.startswith("shapes  "))
    assert row.split()[-2:] == ["1", "100.0%"]  # one answer is truncated
    assert "rows of 384 tokens and 64 frames" in printed.out and "of frame slots" in printed.out
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line["cause"] for line in skipped} == {"empty_conversation", "missing", "unreadable"}
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_check_finds_what_would_stop_training(broken: pathlib.Path, tokenizer, tmp_path, capsys):
    strict = config(max_skip_fraction=0.0)
    found = check(strict, [source(broken)], tokenizer, tmp_path / "report", read_media=0)
    assert len(found.failures) == 1
    text = "training would stop: data source 'shapes' has 2 unusable"
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "bins", "edges"),
    [
        ([7], 12, [6.5, 7.5]),
        ([3, 5], 12, [2.5, 3.5, 4.5, 5.5]),
        ([0, 9], 5, [-0.5, 1.5, 3.5, 5.5, 7.5, 9.5]),
        ([0, 1000], 4, [-0.5, 0.5, 9.5, 99.5, 1000.5]),  # spans decades
    ],
)
def test_histogram_edges_cover_whole_numbers(values: list, bins: int, edges: list):
    found = choose_edges(np.array(values), bins)
    assert len(found) <= bins + 1
    np.testing.assert_allclose(found, edges, atol=1)
    assert np.histogram(values, found)[0].sum() == len(values)


def test_check_and_show_name_the_compressions(shapes_folder, tokenizer, tmp_path, capsys):
    """Of 16 frames, 64 tokens become 16 at temporal_pool=4, and 2 with spatial_pool=2 and temporal_sample=2 too."""
    drawn = (
        TrainedCompression(temporal_pool=4, weight=3),
        TrainedCompression(temporal_pool=4, spatial_pool=2, temporal_sample=2),
    )
    settings = config()
    train = dataclasses.replace(settings.train, compressions=drawn)
    settings = dataclasses.replace(settings, train=train)
    used = source(shapes_folder / "train.json")
    assert not check(settings, [used], tokenizer, tmp_path, read_media=0).failures
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if "of samples" in line]
    assert heads == [
        "temporal_pool=4, spatial_pool=1, temporal_sample=1: 75.0% of samples",
        "temporal_pool=4, spatial_pool=2, temporal_sample=2: 25.0% of samples",
    ]
    records = json.loads((shapes_folder / "train.json").read_text())
    index = next(i for i, record in enumerate(records) if "video" in record)
    with WorkerPool(0) as pool:
        mixture = open_mixture(settings, [used], tokenizer, pool)
        reader = MediaReader(pool, settings.model.vision.image_size, settings.data.frames)
        for number, tokens in enumerate((16, 2)):
            text, _ = show(mixture, Ref(0, index, number), reader, tmp_path)
            facts = text.read_text().splitlines()[1]
            assert f" {tokens} of them visual" in facts and f"spatial_pool={number + 1}" in facts


def test_show_draws_a_sample_and_lists_its_tokens(
    shapes_folder: pathlib.Path, tokenizer, tmp_path: pathlib.Path
):
    records = json.loads((shapes_folder / "train.json").read_text())
    index = next(i for i, record in enumerate(records) if "video" in record)
    answer = records[index]["conversations"][1]["value"]
    settings = config(frames=FramesConfig(time_text="per_group"))
    with WorkerPool(0) as pool:
        mixture = open_mixture(settings, [source(shapes_folder / "train.json")], tokenizer, pool)
        reader = MediaReader(pool, settings.model.vision.image_size, settings.data.frames)
        text, picture = show(mixture, Ref(0, index), reader, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = text.read_text().splitlines()
    assert records[index]["id"] in lines[0] and f"record {index}" in lines[0]
    assert "16 frames at 0.00, " in lines[2]
    trained = "".join(eval(line[25:]) for line in lines if line[20:24].strip() == "*")
    assert trained == f"{answer}<|im_end|>"
    assert sum("visual tokens of medium 0]" in line for line in lines) == 4


@pytest.mark.slow
def test_commands(shapes_folder: pathlib.Path, tmp_path: pathlib.Path):
    train, out = shapes_folder / "train.json", f"--out={tmp_path}/report"
    tokenizer = f"--config.data.tokenizer={shapes_folder}/tokenizer"
    commands = [
        ["check", *arguments(train), out],
        ["check", *arguments(tmp_path / "none.json", tokenizer), out],
        ["show", *arguments(train), out, "--index=1"],
        ["show", *arguments(train), out, "--index=9999"],
        ["show", *arguments(train), out, "--source=other"],
        ["--config=configs/tiny.py:stage=sft"],
    ]
    check_, gone, show_, far, other, neither = run_forked(
        "storm_jax.data",
        [
            "matplotlib.pyplot",
            "ml_collections.config_flags",
            "transformers.configuration_utils",
            "storm_jax.data.check",
            "storm_jax.data.show",
        ],
        commands,
        JAX_PLATFORMS="nowhere",  # using a device would be an error
    )
    assert (check_.returncode, check_.stderr) == (0, "")
    assert "64 samples, 64 used, 0 unusable" in check_.stdout
    assert (gone.returncode, gone.stderr) == (1, "")
    assert f"training would stop: {tmp_path}/none.json does not exist" in gone.stdout
    assert (show_.returncode, show_.stderr) == (0, "")
    text, picture = map(pathlib.Path, show_.stdout.split())
    assert text.read_text() and picture.read_bytes().startswith(b"\x89PNG")
    assert far.returncode == 1 and "--index=9999: shapes has 64 samples" in far.stderr
    assert other.returncode == 1 and "--source=other is not in data.train: shapes" in other.stderr
    assert (
        neither.returncode != 0 and "expected `check` or `show`" in neither.stderr + neither.stdout
    )
