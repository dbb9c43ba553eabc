"""Checkpoints at gs://, in a bucket that is served on this machine."""

from __future__ import annotations

import os
import pathlib
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from fake_gcs import BUCKET, FakeGcs
from processes import Launch, metrics, write_config

from storm_jax.checkpoints import Checkpoints
from storm_jax.files import file_names, read_lines, write_digests
from storm_jax.run import Run, RunError
from storm_jax.sharding import make_mesh
from storm_jax.train import loop

PLACE = f"gs://{BUCKET}/runs/sft"


@pytest.fixture(scope="session")
def server():
    """Clients read the address once, so that a process has one server."""
    server = FakeGcs()
    with pytest.MonkeyPatch.context() as patch, server.serving():
        for name, value in server.environment.items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs")
        yield server


@pytest.fixture
def bucket(server: FakeGcs) -> FakeGcs:
    server.objects.clear()
    server.bytes_read = 0
    server.open()
    return server


@pytest.fixture
def train(small_config, shapes_folder) -> Callable[..., Run]:
    def train(workdir: pathlib.Path, place: str, **changes) -> Run:
        config = small_config(
            **{"train__checkpoint_dir": place, "train__steps": 2, "train__eval_every": 0} | changes
        )
        run = Run(workdir)
        run.prepare(config, shapes_folder / "tokenizer")
        loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})
        return Run(workdir)

    return train


@pytest.fixture
def stored(trained_run, bucket) -> Checkpoints:
    """Parameters in the bucket."""
    source, stored = Run(trained_run).checkpoints, Checkpoints(PLACE)
    stored.write_params(source.restore(source.shapes(2), 2), {})
    return stored


def test_a_run_in_a_bucket_has_the_parameters_of_one_on_disk_and_resumes(
    bucket, train, trained_run, tmp_path
):
    run = train(tmp_path / "run", PLACE)
    on_disk = Run(trained_run).checkpoints
    assert run.checkpoints.shapes(2) == on_disk.shapes(2)
    for name in on_disk.shapes(2):
        np.testing.assert_array_equal(run.checkpoints.read(2, name), on_disk.read(2, name))

    others = ("runs/sft/notes.txt", "runs/sft/old/0/_METADATA", "runs/other/9/_METADATA")
    for key in ("runs/sft/9/params/_METADATA", "runs/sft/probe.0.tmp", *others):
        bucket.write(key, b"{}")
    run = train(run.path, PLACE, train__steps=6)
    assert run.checkpoints.steps() == [3, 6]
    folders = {key.split("/")[2] for key in bucket.objects if key.startswith("runs/sft/")}
    assert folders == {"3", "6", "notes.txt", "old"}
    assert set(others) <= bucket.objects.keys()
    assert not (run.path / "checkpoints").exists()
    losses = [line["step"] for line in read_lines(run.path / "metrics.jsonl") if "loss" in line]
    assert losses == [1, 2, 3, 4, 5, 6]


def test_a_half_written_checkpoint_is_not_listed(bucket, stored):
    assert stored.steps() == [0]
    del bucket.objects["runs/sft/0/commit_success.txt"]
    assert stored.steps() == []


def test_objects_are_compared_without_reading_them(bucket, stored):
    folder = stored.path / "0"
    names = [name for name in file_names(folder) if name != "digests.json"]
    bucket.bytes_read = 0
    write_digests(folder, [folder / name for name in names])
    assert bucket.bytes_read == 0
    sizes = {key: len(content) for key, (_, content) in bucket.objects.items()}
    data = max(sizes, key=sizes.__getitem__)
    stored.verify(0)
    assert bucket.bytes_read == sizes["runs/sft/0/digests.json"]
    _, content = bucket.objects[data]
    bucket.write(data, bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RunError, match=rf"{data.removeprefix('runs/sft/0/')} has changed since"):
        Checkpoints(PLACE).verify(0)
    del bucket.objects[data]
    with pytest.raises(RunError, match="has changed since"):
        Checkpoints(PLACE).verify(0)


def test_checkpoints_can_be_copied_from_a_bucket_and_back(bucket, stored, tmp_path):
    for key, (_, content) in bucket.objects.items():
        path = tmp_path / key.removeprefix("runs/sft/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    copied = Checkpoints(tmp_path)
    copied.verify(0)
    np.testing.assert_array_equal(
        copied.read(0, "decoder/embedding"), stored.read(0, "decoder/embedding")
    )
    file = max((tmp_path / "0/params").rglob("d/*"), key=os.path.getsize)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match="has changed since"):
        Checkpoints(tmp_path).verify(0)


def test_checkpoints_of_a_disk_are_compared_in_a_bucket(bucket, trained_run):
    folder = trained_run / "checkpoints"
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.write(f"runs/sft/{path.relative_to(folder)}", path.read_bytes())
    Checkpoints(PLACE).verify(2)
    data = max((key for key in bucket.objects if "/params/d/" in key), key=len)
    bucket.write(data, bucket.objects[data][1] + b"?")
    with pytest.raises(RunError, match="has changed since"):
        Checkpoints(PLACE).verify(2)


@pytest.mark.parametrize("forbidden", ["/params/d/", "everything"])
def test_training_continues_while_the_bucket_cannot_be_written(
    forbidden, bucket, train, tmp_path, monkeypatch, caplog
):
    real, steps = loop.place, iter(range(1, 100))

    def place(arrays, mesh, rows):
        step = next(steps)
        if step == 3:
            while not Checkpoints(PLACE).steps():  # it is being written
                time.sleep(0.01)
            bucket.forbidden, bucket.is_closed = forbidden, forbidden == "everything"
        if step == 6:
            while not bucket.refused:
                time.sleep(0.01)
            bucket.open()
        return real(arrays, mesh, rows)

    monkeypatch.setattr(loop, "place", place)
    run = train(tmp_path / "run", PLACE, train__steps=6, train__save_every=2)
    assert caplog.text.count("checkpoint 4 could not be saved") == 1
    assert {key.split("/")[2] for key in bucket.objects} == {"2", "6"}
    assert run.checkpoints.steps() == [2, 6]
    run.checkpoints.verify(6)


def test_a_bucket_that_cannot_be_read_is_not_an_empty_one(bucket, stored, train, tmp_path):
    run = train(tmp_path / "run", "")
    bucket.is_closed = True
    with pytest.raises(RunError, match=rf"{PLACE} cannot be read: Forbidden"):
        train(run.path, PLACE)


def test_a_missing_bucket_is_named_before_training(bucket, train, tmp_path):
    with pytest.raises(RunError, match="gs://elsewhere/run cannot be created: ") as caught:
        train(tmp_path / "run", "gs://elsewhere/run")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_resume_from_the_bucket(
    bucket, small_config, shapes_folder, tmp_path
):
    config = small_config(
        data__tokenizer=str(shapes_folder / "tokenizer"), train__checkpoint_dir=PLACE,
        train__steps=12, train__log_every=1, train__eval_every=0, train__save_every=5, mesh__data=-1,
    )  # fmt: skip
    flags = [f"--config={write_config(config, tmp_path / 'config.py')}"]
    launch = Launch(tmp_path / "run", flags, processes=2)
    assert launch.wait_for(7)
    launch.processes[0].kill()
    assert launch.wait(60) == [-signal.SIGKILL, 1]
    assert Launch(tmp_path / "run", flags, processes=2).wait() == [0, 0]
    stored = Run(tmp_path / "run").checkpoints
    assert stored.steps() == [10, 12]
    stored.verify(12)
    on_disk = [*flags, "--config.train.checkpoint_dir="]
    assert Launch(tmp_path / "disk", on_disk, devices=2).wait() == [0]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "disk")
