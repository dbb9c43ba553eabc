"""Training on a mixture of every kind of source with 30 % of its media broken: per-source counts and
skipped.jsonl agree exactly."""

from __future__ import annotations

import json
from collections import Counter

import jax
import numpy as np
import pytest
from media_files import write_numbered
from source_files import (
    conversation,
    picture,
    write_lines,
    write_parquet,
    write_shard,
    write_tfds,
)

from storm_jax.files import read_lines
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.train import loop

COUNT = 30  # samples of each source
BROKEN = 0.3


def ways_to_break(data: bytes) -> list[bytes]:
    """Contents of files that cannot be read."""
    flipped = bytearray(data)
    flipped[len(data) // 8 :: 7] = bytes(len(flipped[len(data) // 8 :: 7]))
    return [
        b"",
        b"This is not a media file.\n" * 20,
        data[: len(data) // 2],
        data[:9],
        bytes(flipped),
    ]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict[str, int]]:
    """The sources of a configuration, and how many samples of each are broken."""
    root = tmp_path_factory.mktemp("broken")
    rng = np.random.default_rng(0)
    video = write_numbered(root / "whole.mp4", 12, g="4").read_bytes()
    image = picture(5)
    expected: Counter[str] = Counter()

    def data(source: str, whole: bytes) -> bytes:
        if rng.random() >= BROKEN:
            return whole
        expected[source] += 1
        ways = ways_to_break(whole)
        return ways[rng.integers(len(ways))]

    records = []
    for i in range(COUNT):  # a JSON list and its files; some are missing, one is a folder
        path = root / f"json/{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        content = data("json", video)
        if content == b"":
            path.mkdir() if expected["json"] == 1 else None
        else:
            path.write_bytes(content)
        records.append({"id": i, "video": path.name, "conversations": conversation("<video>Why?")})
    (root / "json/train.json").write_text(json.dumps(records))

    lines = []
    for i in range(COUNT):  # text, and invalid records
        if rng.random() < BROKEN:
            expected["jsonl"] += 1
            lines.append(
                [{"id": "none"}, {"conversations": conversation()}, {"id": 3, "messages": 5}][i % 3]
            )
        else:
            lines.append({"id": i, "conversations": conversation("Why?", "So. " * (1 + i))})
    write_lines(root / "train.jsonl", lines)

    rows = [
        {"image": {"bytes": data("parquet", image), "path": None}, "conversations": conversation()}
        for _ in range(COUNT)
    ]
    write_parquet(root / "parquet/a.parquet", rows, row_group_size=7)

    members = {}
    for i in range(COUNT):
        members[f"{i:03}.json"] = json.dumps(
            {"conversations": conversation("<video>\nWhy?")}
        ).encode()
        members[f"{i:03}.mp4"] = data("tar", video)
    write_shard(root / "tar/a.tar", members)

    items = [
        {"id": str(i), "image": data("tfds", image) or b"x", "conversations": conversation()}
        for i in range(COUNT)
    ]
    tfds = write_tfds(root / "tfds", {"train": items})

    paths = {"json": "json/train.json", "jsonl": "train.jsonl", "parquet": "parquet", "tar": "tar"}
    sources = [{"name": name, "path": str(root / path)} for name, path in paths.items()]
    return [*sources, {"name": "tfds", "path": str(tfds)}], dict(expected)


def test_broken_files_are_counted_and_skipped(
    mixture, small_config, shapes_folder, tmp_path, capsys
):
    sources, broken = mixture
    assert set(broken) == {"json", "jsonl", "parquet", "tar", "tfds"}
    assert 0.2 < sum(broken.values()) / (5 * COUNT) < 0.4
    config = small_config(
        data__train=sources,
        data__val=[],
        data__rows=[{"tokens": 128, "frames": 16}],
        data__num_workers=2,
        data__max_skip_fraction=0.5,
        train__batch_size=8,
        train__log_every=1,
        train__eval_every=0,
    )
    run = Run(tmp_path / "run")
    run.prepare(config, shapes_folder / "tokenizer")
    loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})

    last = read_lines(run.path / "metrics.jsonl")[-1]
    assert np.isfinite(last["loss"])
    skipped = read_lines(run.path / "skipped.jsonl")
    assert all(line["where"] and line["cause"] and line["message"] for line in skipped)
    table = capsys.readouterr().out
    for name in broken:
        read, used = last[f"data/{name}/read"], last[f"data/{name}/used"]
        causes = {
            key.rpartition("/")[2]: int(value)
            for key, value in last.items()
            if key.startswith(f"data/{name}/skipped/")
        }
        assert read == used + sum(causes.values())
        # One line each: found while training, or when the source was opened.
        lines = [line for line in skipped if line["source"] == name]
        met = Counter(line["cause"] for line in lines if line["file"])
        assert met == causes
        before = [line for line in lines if not line["file"]]
        assert len(before) == (broken[name] if name == "jsonl" else 0)
        assert len({line["where"] for line in lines}) == len(lines)
        assert name == "jsonl" or 0 < len(met) <= broken[name]
        (row,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert row.split()[1:4] == [str(n) for n in (read, used, sum(causes.values()))]
    total_read = sum(last[f"data/{name}/read"] for name in broken)
    assert 40 < total_read <= 5 * COUNT - broken["jsonl"]  # within one epoch: each at most once
