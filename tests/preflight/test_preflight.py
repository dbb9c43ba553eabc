"""The command: it compiles what train.py runs, keeps results, and says what does not fit or is missing."""

from __future__ import annotations

import importlib.metadata
import json

import jax
import pytest
from forked import run_forked
from small_model import SMALL

from storm_jax.data.rows import row_shapes
from storm_jax.preflight.programs import train_program
from storm_jax.preflight.sweep import flags, sweep
from storm_jax.preflight.topologies import TopologyError, open_topology
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.train import loop
from storm_jax.train.step import make_train_step

START = (
    "--config=configs/tiny.py:stage=sft",
    *(f"--config.{name}={value}" for name, value in SMALL.items()),
    "--config.data.rows[0].frames=16",
    "--config.data.rows[0].tokens=128",
    "--config.compression.num_frames=16",
    "--config.model.mixer=none",
)


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Calls the command with each list of arguments in turn; they share a cache."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def run(*calls):
        return run_forked(
            "storm_jax.preflight",
            ["storm_jax.preflight.report"],
            [[*START, *arguments] for arguments in calls],
            XDG_CACHE_HOME=cache,
        )

    return run


class _LoweredError(Exception):
    """Carries the text of the step, and ends the training before it is compiled."""


def test_the_program_is_that_of_train_py(small_config, shapes_folder, tmp_path, monkeypatch):
    config = small_config(mesh__fsdp=8, train__accumulation=1)

    def make_recorded_step(spec, shape):
        def step(state, batch):
            raise _LoweredError(make_train_step(spec, shape).lower(state, batch).as_text())

        return step

    monkeypatch.setattr(loop, "make_train_step", make_recorded_step)
    run = Run(tmp_path / "run")
    run.prepare(config, shapes_folder / "tokenizer")
    with pytest.raises(_LoweredError) as trained:
        loop.train(run, make_mesh(config.mesh), lambda spec, pool: {})
    mesh = make_mesh(config.mesh, open_topology("cpu:8").devices)
    program = train_program(config, mesh, row_shapes(config)[-1])
    assert program.lowered.as_text() == str(trained.value)


def test_results_are_printed_and_kept(call):
    command = ["--topology=cpu:8", "--json", "--programs=train", "--config.mesh.fsdp=2"]
    first, again, table = call(command, command, [*command, "--nojson"])
    assert first.returncode == 0, first.stderr
    assert "compiling" in first.stderr and "compiling" not in again.stderr
    assert first.stdout == again.stdout
    found = json.loads(first.stdout)
    (train,) = found["programs"]
    assert found["devices"] == 8 and found["versions"]["jax"] == jax.__version__
    assert train["mesh"] == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    assert (train["tokens"], train["frames"]) == (16 * 128, 16 * 16)
    trained = sum(part["trained"] for part in found["parameters"].values())
    half = 4 * trained / 2  # float32 over fsdp=2; small parameters are not divisible
    assert half <= train["memory"]["parameters"] < 1.2 * half
    assert train["memory"]["optimizer state"] == pytest.approx(
        2 * train["memory"]["parameters"], rel=0.01
    )
    assert train["memory"]["temporaries"] > 0 and train["fits"]
    assert train["flops"]["formula"] > train["flops"]["model"] > 0
    assert train["collectives"] and all(c["sent"] > 0 for c in train["collectives"].values())
    assert "total, of" in table.stdout and "all-" in table.stdout


def test_mistakes_and_missing_memory_are_one_line(call):
    huge = f"--config.train.batch_size={2**22}"
    problems = {
        "--topology=v9:2": "--topology=v9:2 is not known",
        "--topology=cuda:h100x16": "16 GPUs are not one machine of 1 to 8",
        "--config.mesh.fsdp=3": "needs 6 devices but 8 are available",
        "--config.train.batch_size=4": "Make batch_size / accumulation a multiple of 8",
        "--config.model.nope=4": "config.model has no field 'nope'",
    }
    calls = [["--topology=cpu:8", "--programs=train", argument] for argument in problems]
    *wrong, too_large = call(*calls, ["--topology=cpu:8", "--programs=train", huge])
    for done, problem in zip(wrong, problems.values(), strict=True):
        assert done.returncode == 1 and not done.stdout
        assert problem in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert too_large.returncode == 1 and "4,194,304" in too_large.stdout
    line = too_large.stderr.splitlines()[-1]
    assert "does not fit: it needs" in line and "--config.train.remat=True" in line


def test_a_package_that_is_missing_or_of_another_version_is_named(monkeypatch):
    real = importlib.metadata.version

    def without(package: str, version: str | None):
        def find(name: str) -> str:
            if name != package:
                return "0.0.0" if name == "jax-cuda13-pjrt" else real(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", find)

    without("libtpu", None)
    with pytest.raises(TopologyError, match=r"libtpu is missing: pip install --no-deps 'libtpu=="):
        open_topology("v5p:4x4x8")
    without("libtpu", "0.0.1")
    with pytest.raises(
        TopologyError, match=r"libtpu 0.0.1 is not the version that jax .* needs: pip"
    ):
        open_topology("v5e:2x4")
    without("jax-cuda13-plugin", None)
    with pytest.raises(
        TopologyError, match=r"missing: pip .*'jax-cuda13-plugin.* 'jax-cuda13-pjrt"
    ):
        open_topology("cuda:h200x8")


def test_a_sweep_returns_the_best_that_fit(small_config):
    """A model of memory and time takes the place of the compiler."""
    config = small_config(train__batch_size=64)
    tried = []

    class Fake:
        def __init__(self, config):
            tried.append(config)
            mesh, train = config.mesh, config.train
            self.fits = train.remat and train.accumulation * mesh.tensor >= 2
            self.times = {"compute": 1.0}
            self.seconds = train.accumulation + mesh.tensor + 10 * mesh.data
            self.analysis = type("Memory", (), {"total_memory": 1.0})

    best = sweep(config, 8, Fake)
    assert [
        (c.mesh.fsdp, c.mesh.tensor, c.mesh.context, c.train.accumulation) for c, _ in best
    ] == [
        (8, 1, 1, 2),
        (4, 2, 1, 1),
        (4, 1, 2, 2),
    ]
    assert all(config.mesh.data * config.mesh.fsdp <= 8 for config in tried)
    first = best[0][0]
    assert "--config.mesh.fsdp=8" in flags(first) and "--config.train.remat=True" in flags(first)
    largest = max(tried, key=lambda config: config.train.accumulation)
    assert largest.train.accumulation == 2  # nothing is compiled after the first that fits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "cuda:h100x8", "cuda:h200x8"])
def test_accelerators_are_compiled_for(name, call):
    try:
        open_topology(name)
    except TopologyError as error:
        pytest.skip(str(error))
    (done,) = call([f"--topology={name}", "--json"])
    assert done.returncode == 0, done.stderr
    programs = json.loads(done.stdout)["programs"]
    assert [each["program"] for each in programs] == ["train", "encode", "prefill", "decode"]
    for each in programs:
        assert each["memory"]["parameters"] > 0 and 0 < each["mfu"] < 1
