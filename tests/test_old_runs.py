"""Runs and exports of version 0.1, which had `projector` where there are a stem and a mixer now."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from storm_jax.old_runs import current_model, current_names
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.state import StateSpec

MLP = {"model__stem__kind": "mlp_downsample", "model__mixer": "none"}
OLD_NAMES = {
    "mlp": {"stem/norm1": "norm", "stem/linear1": "linear", "stem/linear2": "mixer/linear"},
    "storm": {"stem/linear1": "linear"},
}


def old_name(name: str, kind: str) -> str:
    for new, old in OLD_NAMES[kind].items():
        name = name.replace(f"projector/{new}/", f"projector/{old}/")
    return name


def rename(tree, kind: str):
    if isinstance(tree, dict):
        return {old_name(key, kind): rename(value, kind) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [rename(part, kind) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


@pytest.mark.parametrize("kind", ["storm", "mlp"])
def test_a_run_of_version_0_1_is_read_and_resumed(
    kind, small_config, shapes_folder, tmp_path: pathlib.Path, monkeypatch
):
    config = small_config(**(MLP if kind == "mlp" else {}))
    run = Run(tmp_path)
    run.prepare(config, shapes_folder / "tokenizer")
    spec = StateSpec.make(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = spec.init()
    write_as_before(run, spec, state, kind)

    old = Run(tmp_path)
    assert old.config == config
    assert old.checkpoints.shapes(0).keys() == spec.shapes.params().keys()
    checkpointer = Checkpointer(old, spec)
    restored, data = checkpointer.restore_latest()
    checkpointer.close()
    assert data == {"sources": {}}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    name = "projector/stem/linear1/kernel"
    np.testing.assert_array_equal(old.checkpoints.read(0, name), state.params()[name])


def write_as_before(run: Run, spec: StateSpec, state, kind: str) -> None:
    path = run.path / "config.json"
    fields = json.loads(path.read_text())
    model = fields["model"]
    stem, mixer = model.pop("stem"), model.pop("mixer")
    model |= {"projector": kind, "projector_args": model.pop("mixer_args")}
    model |= {"downsample": stem["downsample"], "mamba": {**model["mamba"], "mixer": "mamba1"}}
    assert mixer in ("mamba1", "none")
    del model["vision"]["final_norm"]
    path.write_text(json.dumps(fields))
    (run.path / "digests.json").unlink()
    params = {old_name(name, kind): value for name, value in state.params().items()}
    assert len(flatten_dict(unflatten_dict(params, sep="/"))) == len(params)
    with ocp.CheckpointManager(run.path / "checkpoints") as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(unflatten_dict(params, sep="/")),
                opt_state=ocp.args.PyTreeSave(rename(state.opt_state, kind)),
                data=ocp.args.JsonSave({"sources": {}}),
                meta=ocp.args.JsonSave({"step": 0}),
            ),
        )
        manager.wait_until_finished()


def test_fields_of_today_are_unchanged():
    fields = {"mixer": "mamba2", "stem": {"kind": "linear"}, "mamba": {"depth": 3}}
    assert current_model(fields) == fields
    for damaged in ({"projector": ["a"]}, {"projector": "mlp", "mamba": 5}, {"projector": None}):
        assert current_model(damaged) == damaged
    names = ["projector/stem/linear1/kernel", "projector/mixer/linear/kernel", "vision/patch/bias"]
    assert current_names(names) == {name: name for name in names}


def test_a_custom_projector_becomes_a_mixer():
    old = {
        "projector": "m:C",
        "projector_args": {"a": 1},
        "downsample": 3,
        "mamba": {"mixer": "mamba1"},
    }
    assert current_model(old) == {
        "stem": {"kind": "linear", "downsample": 3}, "mixer": "m:C", "mixer_args": {"a": 1}, "mamba": {},
    }  # fmt: skip
