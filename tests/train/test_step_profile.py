"""`train.profile_steps` traces exactly these steps, also when the training ends within them."""

from __future__ import annotations

import os
import pathlib
import signal

import jax
import pytest

from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.train import loop


def train(config, workdir: pathlib.Path, shapes_folder: pathlib.Path) -> int | None:
    run = Run(workdir)
    run.prepare(config, shapes_folder / "tokenizer")
    return loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})


def traces(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The newest last."""
    found = (workdir / "profile").rglob("*.xplane.pb")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def marked_steps(trace: pathlib.Path) -> list[int]:
    return sorted(
        int(dict(event.stats)["step_num"])
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    )


def test_these_steps_are_traced_with_the_parts_of_the_model(
    small_config, shapes_folder, tmp_path, capsys
):
    config = small_config(train__profile_steps="3:4", train__eval_every=0, train__save_every=2)
    train(config, tmp_path, shapes_folder)
    (trace,) = traces(tmp_path)
    assert marked_steps(trace) == [3, 4]
    program = trace.read_bytes()
    for scope in (b"vision", b"projector", b"pool", b"decoder"):
        assert b"transpose(jvp(" + scope in program, scope
    assert f"profile: {tmp_path / 'profile'}\n" in capsys.readouterr().out
    train(config, tmp_path, shapes_folder)
    assert "profile_steps=3:4: nothing to profile after step 6" in capsys.readouterr().out
    assert len(traces(tmp_path)) == 1


@pytest.mark.parametrize("ends", ["stopped", "failed"])
def test_a_training_that_ends_within_the_steps_closes_its_trace(
    ends, small_config, shapes_folder, tmp_path, monkeypatch
):
    config = small_config(train__profile_steps="2:5", train__eval_every=0, train__save_every=1)
    real, calls = loop.place, iter(range(1, 100))

    def place(arrays, mesh, rows):
        if next(calls) == 3:
            if ends == "failed":
                raise ValueError("in the third step")
            os.kill(os.getpid(), signal.SIGTERM)
        return real(arrays, mesh, rows)

    monkeypatch.setattr(loop, "place", place)
    if ends == "failed":
        with pytest.raises(ValueError, match="in the third step"):
            train(config, tmp_path, shapes_folder)
    else:
        assert train(config, tmp_path, shapes_folder) == 3
    (trace,) = traces(tmp_path)
    assert marked_steps(trace) == [2, 3]
    train(config, tmp_path, shapes_folder)
    first_left = 4 if ends == "stopped" else 3
    assert marked_steps(traces(tmp_path)[-1]) == list(range(first_left, 6))


def test_a_trace_that_cannot_be_written_does_not_end_the_training(
    small_config, shapes_folder, tmp_path, caplog
):
    (tmp_path / "profile").write_text("in the way")
    config = small_config(train__profile_steps="3:4", train__eval_every=0)
    assert train(config, tmp_path, shapes_folder) is None
    jax._src.profiler._profile_state.reset()  # or this process could trace nothing more
    assert f"the profile was not written to {tmp_path / 'profile'}" in caplog.text
