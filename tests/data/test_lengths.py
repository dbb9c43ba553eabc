"""The lengths index: equal to the encoder's lengths, cached, recomputed when necessary, and independent of
the number of processes."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest
from media_files import write_numbered
from source_files import record, write_lines

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig, FramesConfig, SourceConfig
from storm_jax.data import lengths as lengths_lib
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.lengths import read_lengths
from storm_jax.data.sources import open_source
from storm_jax.media.workers import WorkerPool
from storm_jax.text.conversation import ConversationEncoder


@pytest.fixture
def read(tokenizer):
    def measure(
        path: pathlib.Path, system="", fps=0.0, pool=4, count=0, style="none", time_limit=60.0
    ):
        config = SourceConfig(name="some", path=str(path))
        frames = FramesConfig(fps=fps, time_text=style, time_limit=time_limit)
        text = ConversationEncoder(tokenizer, system)
        encoder = SampleEncoder(
            text=text,
            grid=Grid.square(2),
            compression=CompressionConfig(num_frames=8, temporal_pool=pool),
            frames=frames,
        )
        source = open_source(config)
        with WorkerPool(count) as workers:
            return (
                read_lengths(config, source, encoder, [encoder.compression], "", workers),
                source,
                encoder,
            )

    return measure


def write(folder: pathlib.Path, records: list) -> pathlib.Path:
    path = folder / "a.jsonl"
    write_lines(path, records)
    return path


def test_lengths_are_those_of_the_encoded_samples(read, tmp_path: pathlib.Path):
    records = [
        record("text"),
        record("bad", "<image>"),
        record("image", "<image>", image="a.png"),
        record("two", "<video><image>", video="a.mp4", image="a.png"),
        {"id": "worse"},
    ]
    found, source, encoder = read(write(tmp_path, records))
    assert [found.counts_of(i) for i in range(5)] == [[], [], [1], [8, 1], []]
    for i in (0, 2, 3):
        sample = source.sample(i)
        encoded = encoder.encode(sample, [np.zeros(n) for n in found.counts_of(i)])
        assert (found.tokens[i, 0], found.min_tokens[i, 0]) == (len(encoded), encoded.min_tokens)
        assert found.frames[i] == sum(found.counts_of(i))
    assert found.tokens[[1, 4]].tolist() == [[0], [0]]
    assert {i: (skip.sample, skip.cause) for i, skip in found.skips.items()} == {
        1: ("bad", "placeholder"),
        4: ("worse", "empty_conversation"),
    }
    assert found.skips[4].where == f"{tmp_path}/a.jsonl line 5, record 4"


def test_many_processes_measure_the_same_as_one(read, tmp_path: pathlib.Path):
    records = [record(f"{i}", "why " * (i % 7)) for i in range(50)] + [{"id": "bad"}]
    records *= 50  # three chunks
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    alone, _, _ = read(write(tmp_path / "one", records))
    shared, _, _ = read(write(tmp_path / "two", records), count=2)
    for name in ("tokens", "min_tokens", "frames", "counts", "ends", "digest"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))
    assert list(alone.skips) == list(shared.skips) == list(range(50, 2550, 51))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, False),
        ({"system": "Be brief."}, True),
        ({"pool": 2}, True),
        ({"style": "sentence"}, True),
        ({"fps": 1.0}, True),
    ],
)
def test_index_is_cached_until_a_relevant_setting_changes(
    read, tmp_path: pathlib.Path, monkeypatch, change: dict, again: bool
):
    path = write(tmp_path, [record("a"), record("b", "<video>", video="missing.mp4")])
    read(path)
    measured = []
    real = lengths_lib._measure
    monkeypatch.setattr(lengths_lib, "_measure", lambda *a: measured.append(1) or real(*a))
    read(path, **change)
    assert bool(measured) == again


def test_index_is_recomputed_when_the_source_changes(read, tmp_path: pathlib.Path):
    records = [record("a"), record("b", "Why is it so?"), record("c")]
    digests = {}
    for name, changed in {
        "same": records,
        "order": [records[2], records[1], records[0]],
        "fewer": records[:2],
        "name": [record("z"), *records[1:]],
        "length": [record("a", "Why, why, why?"), *records[1:]],
        "word": [record("a", "How?"), *records[1:]],
        "edge": [record("aa"), record("", "Why is it so?"), record("c")],
    }.items():
        digests[name] = read(write(tmp_path, changed))[0].digest
    assert len(set(digests.values())) == len(digests)
    assert read(write(tmp_path, records))[0].digest == digests["same"]


def test_frames_at_a_rate_are_counted_from_headers(read, tmp_path: pathlib.Path):
    write_numbered(tmp_path / "long.mp4", 30)
    write_numbered(tmp_path / "short.mp4", 10)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    records = [
        record(name, "<video>", video={"path": f"{name}.mp4", **bounds})
        for name, bounds in [("long", {}), ("short", {}), ("long", {"start": 2}), ("bad", {})]
    ]
    found, _, _ = read(write(tmp_path, records), fps=2.0)
    # An unreadable header counts as the maximum; the error is reported when the file is read.
    assert found.frames.tolist() == [7, 3, 3, 8]
    assert not found.skips


def test_a_damaged_index_is_recomputed(read, tmp_path: pathlib.Path):
    path = write(tmp_path, [record("a")])
    before = read(path)[0].tokens.tolist()
    for array in (tmp_path / "a.jsonl.index").rglob("tokens.npy"):
        array.write_bytes(array.read_bytes()[:20])
    assert read(path)[0].tokens.tolist() == before


@pytest.mark.slow
def test_a_header_that_hangs_costs_one_sample(read, tmp_path: pathlib.Path, monkeypatch):
    """Without processes, the index would never be finished."""
    monkeypatch.setattr(lengths_lib, "_START", 10.0)
    os.mkfifo(tmp_path / "hangs.mp4")
    write_numbered(tmp_path / "a.mp4", 20, "libx264")
    names = ["a.mp4", "hangs.mp4", "a.mp4"]
    path = write(tmp_path, [record(str(i), "<video>", video=n) for i, n in enumerate(names)])
    found, _, _ = read(path, fps=1.0, count=1, time_limit=5.0)
    assert found.skips.keys() == {1}
    assert found.skips[1].cause == "timeout"
    assert "headers were not read within data.frames.time_limit=5 s" in found.skips[1].message
    assert found.counts_of(0) == found.counts_of(2) != []
    (tmp_path / "hangs.mp4").unlink()
    write_numbered(tmp_path / "hangs.mp4", 20, "libx264")
    found, _, _ = read(path, fps=1.0, count=1, time_limit=5.0)  # it was not cached
    assert found.skips == {}
