"""A mixture of every kind of source with 30 % of its media broken."""

from __future__ import annotations

import json
import pathlib
from collections import Counter

import numpy as np
from media_files import write_numbered
from source_files import (
    conversation,
    picture,
    write_lines,
    write_parquet,
    write_shard,
    write_tfds,
)

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


def make_broken_mixture(root: pathlib.Path) -> tuple[list[dict], dict[str, int]]:
    """Writes the sources of a configuration; returns them and how many samples of each are broken."""
    root.mkdir()
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
