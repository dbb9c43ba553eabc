"""Interrupted runs resume exactly, other configurations and data are refused, bad samples are logged.

Numbers of steps are compiled into the training step, so tests share two of them (2 and 6), and most
of the compiled programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import ConfigError
from storm_jax.data.mixture import open_mixture
from storm_jax.data.skips import DataError
from storm_jax.files import read_lines
from storm_jax.media.workers import WorkerPool
from storm_jax.run import Run, RunError
from storm_jax.sharding import make_mesh
from storm_jax.train import loop
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.initialisation import inherit_model, load_params
from storm_jax.train.state import StateSpec
from storm_jax.train.validation import make_validation

ROOT = pathlib.Path(__file__).parents[2]


def start_training(config, workdir, shapes_folder):
    run = Run(workdir)
    run.prepare(config, shapes_folder / "tokenizer")
    loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})
    return run


def losses(workdir) -> dict[int, float]:
    lines = read_lines(pathlib.Path(workdir) / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def source(path: pathlib.Path, media_root: pathlib.Path | str = "", **fields) -> dict:
    return {"name": path.stem, "path": str(path), "media_root": str(media_root), **fields}


def two_sources(small_config, shapes_folder, folder: pathlib.Path, **changes):
    """A configuration with workers, two sources and two row shapes."""
    texts = folder / "texts.jsonl"
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    texts.write_text(f"{json.dumps({'conversations': turns})}\n" * 90)
    return small_config(
        train__steps=9,
        train__save_every=2,
        train__eval_every=0,
        data__train=[source(shapes_folder / "train.json", weight=2), source(texts, weight=5)],
        data__rows=[{"tokens": 128, "frames": 4}, {"tokens": 128, "frames": 16}],
        **changes,
    )


def assert_same_training(whole: Run, resumed: Run) -> None:
    """Equal losses and per-source counts, and the same batches, some of them repeated."""
    assert losses(resumed.path) == losses(whole.path)
    assert sorted(losses(resumed.path)) == list(range(1, 10))
    batches, repeated = (
        (run.path / "batches.txt").read_text().splitlines() for run in (whole, resumed)
    )
    assert len(batches) == 9 < len(repeated)
    assert repeated[-1] == batches[-1] and set(repeated) == set(batches)
    counts = final_metrics(whole.path)
    assert final_metrics(resumed.path) == counts
    assert counts["data/texts/read"] > counts["data/train/read"] > 0
    assert counts["compilations"] == 2


def test_interrupted_training_resumes_bit_for_bit(
    small_config, shapes_folder, tmp_path, monkeypatch
):
    """In the middle of an epoch; the last line of metrics.jsonl may be incomplete."""

    class Interrupt(BaseException):
        pass

    config = two_sources(
        small_config, shapes_folder, tmp_path, model__mixer="none", data__num_workers=1
    )
    place = loop.place

    def train(run: Run, last_step: int) -> None:
        steps = iter(range(run_start(run) + 1, 10))

        def logged(arrays, mesh, rows):
            if next(steps) > last_step:
                raise Interrupt
            digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays)))
            with (run.path / "batches.txt").open("a") as file:
                print(digest.hexdigest(), file=file)
            return place(arrays, mesh, rows)

        monkeypatch.setattr(loop, "place", logged)
        loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})

    whole, resumed = Run(tmp_path / "whole"), Run(tmp_path / "resumed")
    for run in (whole, resumed):
        run.prepare(config, shapes_folder / "tokenizer")
    train(whole, last_step=9)
    for last_step in (3, 7):
        with pytest.raises(Interrupt):
            train(resumed, last_step)
        with (resumed.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "lo')
    train(resumed, last_step=9)
    assert_same_training(whole, resumed)


def run_start(run: Run) -> int:
    return max(run.checkpoints.steps(), default=0)


# Trains a run, and logs a digest of every batch.
TRAINER = """
import hashlib, jax, sys
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.train import loop
run = Run(sys.argv[1])
place = loop.place
def logged(arrays, mesh, rows):
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays)))
    with (run.path / "batches.txt").open("a") as file:
        print(digest.hexdigest(), file=file)
    return place(arrays, mesh, rows)
loop.place = logged
loop.train(run, make_mesh(run.config.mesh, jax.devices()[:1]), lambda spec, pool: {})
"""


@pytest.mark.slow
def test_killed_training_resumes_bit_for_bit(small_config, shapes_folder, tmp_path):
    """A process that is killed at any moment, possibly while it saves."""
    config = two_sources(small_config, shapes_folder, tmp_path, data__num_workers=2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    for run in (whole, killed):
        run.prepare(config, shapes_folder / "tokenizer")
    subprocess.run([sys.executable, "-c", TRAINER, str(whole.path)], env=environment, check=True)
    log = killed.path / "metrics.jsonl"
    for kill_after in (3, 6):
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(killed.path)], env=environment
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and max(losses(killed.path), default=0) >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
    subprocess.run([sys.executable, "-c", TRAINER, str(killed.path)], env=environment, check=True)
    assert_same_training(whole, killed)


def final_metrics(workdir: pathlib.Path) -> dict[str, float]:
    """The last line with per-source counts, without times."""
    last = [line for line in read_lines(workdir / "metrics.jsonl") if "data/train/read" in line][-1]
    return {k: v for k, v in last.items() if not k.endswith("/seconds")}


def test_last_and_best_checkpoints_are_kept(small_config, shapes_folder, tmp_path):
    config = small_config(
        train__steps=6, train__save_every=1, train__eval_every=1, train__keep_last=1
    )
    values = iter([5.0, 1.0, 4.0, 3.0, 2.0, 6.0])
    run = Run(tmp_path)
    run.prepare(config, shapes_folder / "tokenizer")
    loop.train(
        run,
        make_mesh(config.mesh, jax.devices()[:1]),
        lambda spec, pool: {"fake": lambda state: {"val_loss": next(values)}},
    )
    kept = sorted(int(path.name) for path in run.checkpoints.path.iterdir() if path.name.isdigit())
    assert kept == [2, 6]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model__decoder__width": 64}, "model.decoder.width: 32 there, 64 now"),
        ({"train__steps": 1}, "was trained to step 2, beyond train.steps=1"),
        ({"init_from": "/elsewhere"}, "init_from: '' there, '/elsewhere' now"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_overwritten(
    changes, problem, trained_run, small_config, shapes_folder, tmp_path
):
    run = Run(tmp_path / "run")
    shutil.copytree(trained_run, run.path)
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(RunError, match=problem):
        run.prepare(small_config(**changes), shapes_folder / "tokenizer")
    assert (run.path / "config.json").read_bytes() == before
    run.prepare(small_config(train__steps=20), shapes_folder / "tokenizer")


def test_a_failed_start_may_be_repeated_with_another_configuration(
    small_config, shapes_folder, tmp_path
):
    run = Run(tmp_path)
    run.prepare(
        small_config(data__train=[{"name": "a", "path": "dtaa/train.json"}]),
        shapes_folder / "tokenizer",
    )
    run.prepare(small_config(), shapes_folder / "tokenizer")
    assert run.config == small_config()


def test_a_batch_that_the_mesh_cannot_split_is_refused(small_config, shapes_folder, tmp_path):
    config = small_config(train__batch_size=12, mesh__data=8)
    run = Run(tmp_path)
    run.prepare(config, shapes_folder / "tokenizer")
    with pytest.raises(
        ConfigError, match=r"train.batch_size=12 .* does not divide over .* 8 devices"
    ):
        loop.train(run, make_mesh(config.mesh), lambda spec, pool: {})


def test_a_workdir_that_cannot_be_written_is_an_error(small_config, shapes_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Run(tmp_path / "file" / "run").prepare(small_config(), shapes_folder / "tokenizer")


def test_checkpoints_in_another_folder_resume_and_start_other_runs(
    small_config, shapes_folder, tmp_path
):
    elsewhere = tmp_path / "disk/checkpoints"
    changes = {"train__checkpoint_dir": str(elsewhere), "train__eval_every": 0}
    config = small_config(train__steps=2, **changes)
    run = start_training(config, tmp_path / "run", shapes_folder)
    assert not (run.path / "checkpoints").exists()
    (elsewhere / "9.orbax-checkpoint-tmp").mkdir()
    run = start_training(small_config(train__steps=6, **changes), run.path, shapes_folder)
    assert sorted(path.name for path in elsewhere.iterdir() if path.is_dir()) == ["3", "6"]
    assert sorted(losses(run.path)) == list(range(1, 7))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = load_params(Run(run.path), StateSpec.make(config, mesh))
    stored = Run(run.path).checkpoints.read(6, "decoder/embedding")
    np.testing.assert_array_equal(params["decoder/embedding"], stored)


def test_a_checkpoint_of_another_shape_names_the_parameters(trained_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(trained_run, run.path)
    text = (run.path / "config.json").read_text()
    (run.path / "config.json").write_text(text.replace('"mlp_dim": 32', '"mlp_dim": 48'))
    (run.path / "digests.json").unlink()
    with pytest.raises(RunError, match=r"decoder/layers/down/kernel is \(2, 32, 32\)"):
        loop.train(run, make_mesh(run.config.mesh, jax.devices()[:1]), lambda spec, pool: {})


def test_init_from_takes_all_parameters_and_refuses_another_model(
    small_config, shapes_folder, tmp_path
):
    """Checkpoints of a run that trains only the projector are complete, too."""
    only_projector = {"optim__learning_rate__vision": 0.0, "optim__learning_rate__decoder": 0.0}
    align = Run(tmp_path / "align")
    align.prepare(small_config(**only_projector), shapes_folder / "tokenizer")
    mesh = make_mesh(align.config.mesh, jax.devices()[:1])
    spec = StateSpec.make(align.config, mesh)
    with contextlib.closing(Checkpointer(align, spec)) as checkpointer:
        checkpointer.save(1, spec.init(), {}, {})
    config = small_config(init_from=str(align.path))
    params = load_params(align, StateSpec.make(config, mesh))
    assert params["decoder/embedding"].shape == (512, 32)
    other = small_config(model__decoder__width=64, init_from=str(align.path))
    with pytest.raises(RunError, match=r"model.decoder.width: 32 there, 64 here"):
        load_params(align, StateSpec.make(other, mesh))


def test_imported_weights_are_the_start_of_other_runs(
    trained_run, small_config, shapes_folder, tmp_path
):
    checkpoints = Run(trained_run).checkpoints
    params = {path: jnp.asarray(checkpoints.read(2, path)) for path in checkpoints.shapes(2)}
    imported = Run(tmp_path / "imported")
    imported.prepare(small_config(), shapes_folder / "tokenizer")
    imported.checkpoints.write_params(params, {})
    with pytest.raises(RunError, match="contains imported weights"):
        start_training(small_config(), imported.path, shapes_folder)
    config = small_config(train__steps=2, init_from=str(imported.path))
    start_training(config, tmp_path / "other", shapes_folder)


def test_a_mixer_is_added_to_a_run_without_one(small_config, shapes_folder, tmp_path, capsys):
    stem = {"model__stem__kind": "mlp_downsample"}
    without = Run(tmp_path / "without")
    without.prepare(small_config(model__mixer="none", **stem), shapes_folder / "tokenizer")
    mesh = make_mesh(without.config.mesh, jax.devices()[:1])
    spec = StateSpec.make(without.config, mesh)
    params = spec.init().params()
    without.checkpoints.write_params(params, {})
    config, changes = inherit_model(small_config(init_from=str(without.path)), without, explicit=[])
    assert changes == {"model.stem.kind": ("linear", "mlp_downsample")}
    loaded = load_params(without, StateSpec.make(config, mesh))
    added = {name for name in loaded if name.startswith("projector/mixer/")}
    assert loaded.keys() - added == params.keys() and added
    jax.tree.map(np.testing.assert_array_equal, {n: loaded[n] for n in params}, params)
    assert not np.any(loaded["projector/mixer/layers/mixer/out_proj/kernel"])
    assert "model.mixer='mamba1' is new" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"model.stem.kind='linear', not 'mlp_downsample'"):
        inherit_model(small_config(), without, explicit=["model.stem.kind"])


def test_tower_and_decoder_are_inherited_with_the_weights(trained_run, small_config):
    other = small_config(model__decoder__mlp_dim=64, model__vision__depth=3)
    inherited, changes = inherit_model(other, Run(trained_run), explicit=["train.steps"])
    assert inherited == small_config()
    assert changes == {"model.decoder.mlp_dim": (64, 32), "model.vision.depth": (3, 2)}
    with pytest.raises(
        ConfigError, match=r"a different value of\n  model.decoder.mlp_dim=64, not 32"
    ):
        inherit_model(other, Run(trained_run), explicit=["model.decoder.mlp_dim"])
    adapted = small_config(model__decoder__lora__rank=2, model__mamba__depth=1)
    assert inherit_model(adapted, Run(trained_run), explicit=[])[0] == adapted


def test_rows_longer_than_the_decoder_was_trained_for_raise_a_warning(
    small_config, shapes_folder, tmp_path, caplog
):
    config = small_config(model__decoder__max_positions=100, train__steps=2, train__eval_every=0)
    start_training(config, tmp_path, shapes_folder)
    assert "longer than the 100 positions" in caplog.text


def test_a_run_may_resume_with_moved_data_but_not_with_changed_data(
    small_config, shapes_folder, tmp_path
):
    records = json.loads((shapes_folder / "train.json").read_text())
    train = tmp_path / "train.json"
    train.write_text(json.dumps(records))
    config = small_config(
        train__steps=2,
        train__eval_every=0,
        data__train=[source(train, shapes_folder)],
    )
    start_training(config, tmp_path / "run", shapes_folder)
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(records))
    elsewhere = {**source(moved, shapes_folder), "name": "train"}
    start_training(
        dataclasses.replace(
            config, data=small_config(train__eval_every=0, data__train=[elsewhere]).data
        ),
        tmp_path / "run",
        shapes_folder,
    )
    train.write_text(json.dumps(records[1:]))
    with pytest.raises(DataError, match=r"data source train is not what .* was trained on"):
        start_training(config, tmp_path / "run", shapes_folder)


def test_bad_samples_are_counted_by_cause_and_logged_once(
    small_config, shapes_folder, tmp_path, caplog
):
    records = json.loads((shapes_folder / "train.json").read_text())
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    records[0] = {**records[0], "video": str(broken), "image": None}
    records[0]["conversations"][0]["value"] = "<video>\nWhat?"
    records[1] = {**records[1], "conversations": []}
    train = tmp_path / "train.json"
    train.write_text(json.dumps(records))
    config = small_config(
        train__eval_every=0,
        train__save_every=6,
        data__train=[source(train, shapes_folder)],
    )
    run = start_training(config, tmp_path / "run", shapes_folder)
    skipped = [json.loads(line) for line in (run.path / "skipped.jsonl").read_text().splitlines()]
    assert {line["cause"]: (line["where"], line["file"]) for line in skipped} == {
        "empty_conversation": (f"{train} line 1, record 1", ""),
        "unreadable": (f"{train} line 1, record 0", str(broken)),
    }
    assert len(losses(run.path)) == 6
    assert final_metrics(run.path)["data/train/read"] > len(records)  # more than one epoch


def test_too_many_bad_samples_stop_the_run(small_config, shapes_folder, tmp_path):
    records = json.loads((shapes_folder / "train.json").read_text())
    media = tmp_path / "media"
    shutil.copytree(shapes_folder, media)
    for video in (media / "media/train").glob("*.mp4"):
        video.unlink()
    assert any("video" in record for record in records)
    config = small_config(
        train__steps=60,
        train__eval_every=0,
        data__train=[source(media / "train.json")],
        data__max_skip_fraction=0.05,
    )
    with pytest.raises(DataError, match="missing"):
        start_training(config, tmp_path / "run", shapes_folder)


def test_validation_without_media_stops_the_run(small_config, shapes_folder, tmp_path):
    """A loss of zero would make its checkpoint the best one forever."""
    val = tmp_path / "val.json"
    val.write_text((shapes_folder / "val.json").read_text())  # but not its media
    config = small_config(data__val=[source(val)])
    run, pool = Run(tmp_path / "run"), WorkerPool(0)
    run.prepare(config, shapes_folder / "tokenizer")
    mixture = open_mixture(config, config.data.val, run.tokenizer(), pool)
    spec = StateSpec.make(config, make_mesh(config.mesh, jax.devices()[:1]))
    evaluate = make_validation(run, spec, mixture, pool)
    with jax.set_mesh(spec.mesh), pytest.raises(DataError, match=r"validation met .* missing"):
        evaluate(spec.init())
    lines = (run.path / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == len(mixture)
    with (run.path / "skipped.jsonl").open("a") as file:
        file.write(lines[0][:10])  # as if interrupted
    make_validation(run, spec, mixture, pool)
    assert (run.path / "skipped.jsonl").read_text().splitlines() == lines
    (run.path / "skipped.jsonl").write_text(lines[0][:10])
    make_validation(run, spec, mixture, pool)
    assert (run.path / "skipped.jsonl").read_text() == ""


def test_a_checkpoint_is_saved_when_validation_fails(small_config, shapes_folder, tmp_path):
    def fail(state):
        raise DataError("the disk is gone")

    run = Run(tmp_path)
    config = small_config(train__save_every=6, train__eval_every=2)
    run.prepare(config, shapes_folder / "tokenizer")
    with pytest.raises(DataError, match="the disk is gone"):
        loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {"val": fail})
    assert run.checkpoints.resolve(None) == 2


@pytest.mark.parametrize(
    ("digests", "problem"), [(True, "has changed since it was written"), (False, "cannot be read")]
)
def test_a_damaged_checkpoint_is_reported_by_step(digests, problem, trained_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(trained_run, run.path)
    for data in (run.path / "checkpoints/2/params").rglob("*"):
        if data.is_file():
            data.write_bytes(data.read_bytes()[:20])
    if not digests:
        (run.checkpoints.path / "2/digests.json").unlink()
    with pytest.raises(RunError, match=rf"checkpoint 2 of .*: .*{problem}"):
        loop.train(run, make_mesh(run.config.mesh, jax.devices()[:1]), lambda spec, pool: {})


def test_a_loss_that_is_not_finite_stops_with_the_batch(
    small_config, shapes_folder, tmp_path, monkeypatch
):
    real = loop.place

    def poisoned(arrays, mesh, rows):
        arrays = {**arrays, "loss_weights": arrays["loss_weights"] * np.float32(np.nan)}
        return real(arrays, mesh, rows)

    monkeypatch.setattr(loop, "place", poisoned)
    with pytest.raises(loop.NonFiniteLossError, match=r"step 1: loss nan.*train-"):
        start_training(small_config(), tmp_path, shapes_folder)
    saved = np.load(tmp_path / "nonfinite_step_1.npz")
    assert set(saved["sample_ids"]) and saved["frames"].dtype == np.uint8


def block_checkpoints(run: Run, monkeypatch, first: int, last: int) -> None:
    """A file is where the checkpoints were, from one step to another."""
    real, away = loop.place, run.path / "away"
    steps = iter(range(1, 100))

    def place(arrays, mesh, rows):
        step = next(steps)
        if step == first:
            while not run.checkpoints.steps():  # it is being written
                time.sleep(0.01)
            run.checkpoints.path.rename(away)
            run.checkpoints.path.write_text("in the way")
        if step == last:
            run.checkpoints.path.unlink()
            away.rename(run.checkpoints.path)
        return real(arrays, mesh, rows)

    monkeypatch.setattr(loop, "place", place)


def test_training_continues_while_checkpoints_cannot_be_written(
    small_config, shapes_folder, tmp_path, monkeypatch, caplog
):
    run = Run(tmp_path / "run")
    block_checkpoints(run, monkeypatch, first=3, last=6)
    config = small_config(train__save_every=2, train__eval_every=0)
    start_training(config, run.path, shapes_folder)
    assert caplog.text.count("checkpoint 4 could not be saved (Not a directory)") == 1
    assert "Training continues" in caplog.text
    assert run.checkpoints.steps() == [2, 6]
    assert sorted(losses(run.path)) == list(range(1, 7))
    run.checkpoints.verify(6)


def test_the_third_failed_save_in_a_row_ends_the_training(
    small_config, shapes_folder, tmp_path, monkeypatch
):
    run = Run(tmp_path / "run")
    block_checkpoints(run, monkeypatch, first=2, last=0)
    config = small_config(train__save_every=1, train__eval_every=0)
    with pytest.raises(RunError, match=r"checkpoint 4 .*Not a directory.*nor could the 2 before"):
        start_training(config, run.path, shapes_folder)
    assert [path.name for path in (run.path / "away").iterdir()] == ["1"]


def test_sigterm_saves_and_stops_and_the_rest_is_unchanged(
    small_config, shapes_folder, tmp_path, monkeypatch
):
    config = small_config(train__save_every=50, train__eval_every=0)
    whole = start_training(config, tmp_path / "whole", shapes_folder)
    real = loop.place

    def place(arrays, mesh, rows):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(arrays, mesh, rows)

    run = Run(tmp_path / "stopped")
    run.prepare(config, shapes_folder / "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "place", place)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        stops = [loop.train(run, mesh, lambda spec, pool: {}) for _ in range(2)]
    assert stops == [1, 2] == run.checkpoints.steps()[-2:]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    start_training(config, run.path, shapes_folder)
    assert losses(run.path) == losses(whole.path)
