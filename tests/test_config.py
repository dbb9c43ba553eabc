"""A wrong configuration is refused whole, with the name of each field."""

from __future__ import annotations

import json

import pytest

from configs import tiny
from storm_jax import config as config_lib
from storm_jax.config import ConfigError, ModelConfig, RunConfig, from_dict, to_dict

SOURCE = {"name": "a", "path": "a.json"}


def fields(**changes) -> dict:
    made = tiny.get_config("stage=sft").to_dict()
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = made
        for parent in parents:
            node = node[parent]
        node[last] = value
    return made


def test_dict_and_json_round_trip(tmp_path):
    config = from_dict(RunConfig, fields())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert config_lib.load(path) == config


def test_arguments_of_a_projector_read_back_as_they_were():
    changes = {"model__mixer": "m:C", "model__mixer_args": {"sizes": (1, 2), "a": {"b": 1}}}
    config = from_dict(RunConfig, fields(**changes))
    assert config.model.mixer_args == {"sizes": [1, 2], "a": {"b": 1}}
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model__vision__colour": "red"}, "model.vision.colour is an unknown field"),
        ({"train__steps": "ten"}, "train.steps='ten' must be an integer"),
        ({"train__steps": True}, "train.steps=True must be an integer"),
        ({"train__steps": -1}, "train.steps=-1 must be positive"),
        ({"train__steps": 2.5}, "train.steps=2.5 must be an integer"),
        ({"optim__learning_rate__vision": -1e-3}, "optim.learning_rate.vision=-0.001"),
        ({"model": 3}, "model=3 must be a mapping"),
        ({"model__decoder__num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"model__decoder__head_dim": 7}, "head_dim=7 must be even"),
        ({"model__vision__num_heads": 5}, "num_heads=5 does not divide width=64"),
        ({"model__vision__feature_layer": 0}, "feature_layer=0 must be in [-2, -1]"),
        ({"model__vision__feature_layer": -3}, "feature_layer=-3 must be in [-2, -1]"),
        ({"model__mixer": "mamba"}, "mixer='mamba' must be"),
        ({"model__stem__kind": "mlp"}, "kind='mlp' must be one of linear, mlp2x_gelu"),
        ({"model__stem__kind": "mlp2x_gelu", "model__stem__bias": False}, "bias=False is only for"),
        (
            {"model__vision__final_norm": True, "model__vision__feature_layer": -2},
            "needs feature_layer=-1",
        ),
        ({"model__stem__video_pool": "mean"}, "video_pool='mean' must be one of none, bilinear"),
        (
            {"model__stem__video_pool": "max", "model__stem__downsample": 4},
            "a grid of one token has no half",
        ),
        ({"model__layout__video_newline": "grid"}, "video_newline='grid' must be one of none, row"),
        (
            {"model__layout__group_time": "{frames}"},
            "group_time='{frames}' may contain only {time}",
        ),
        (
            {"model__layout__before_video": "{0"},
            "before_video='{0' may contain only {frames}, {count}",
        ),
        ({"model__mixer_args": {"a": 1}}, "apply to a custom mixer"),
        ({"model__mamba__direction": "back"}, "direction='back'"),
        ({"model__mixer": "s4"}, "mixer='s4'"),
        (
            {"model__mixer": "mamba2", "model__mamba__head_dim": 50},
            "mamba.head_dim=50 must divide",
        ),
        ({"model__dtype": "float16"}, "dtype='float16'"),
        ({"compression__num_frames": 100}, "exceeds the 64 frames of the largest row in data.rows"),
        ({"train__accumulation": 3}, "accumulation=3 does not divide batch_size=16"),
        (
            {"train__checkpoint_dir": "s3://bucket/run"},
            "checkpoint_dir=s3://bucket/run: Orbax writes to folders and gs:// only",
        ),
        (
            {"train__profile_steps": "3"},
            "train.profile_steps='3' must be 'A:B', the first and the last step to profile",
        ),
        ({"train__profile_steps": "-3:4"}, "train.profile_steps='-3:4' must be 'A:B'"),
        ({"train__profile_steps": "4:3"}, "profile_steps='4:3': the last step is before the first"),
        (
            {"train__profile_steps": "0:2"},
            "profile_steps='0:2': the steps must be from 1 to steps=",
        ),
        (
            {"train__steps": 9, "train__profile_steps": "8:10"},
            "profile_steps='8:10': the steps must be from 1 to steps=9",
        ),
        ({"optim__warmup_fraction": 1.0}, "warmup_fraction=1.0 must be below 1"),
        (
            {"optim__decay_pattern": "*kernel"},
            "decay_pattern='*kernel' is not a valid regular expression",
        ),
        ({"model__mixer": "m:C", "model__mixer_args": {"a": {1}}}, "must be plain JSON"),
        ({"model__mixer": "m:C", "model__mixer_args": None}, "must be a mapping of fields"),
        ({"data__max_skip_fraction": 1.5}, "max_skip_fraction=1.5 must be at most 1"),
        ({"data__train": "a.json"}, "data.train='a.json' must be a list of mappings"),
        ({"data__train": [3]}, "data.train[0]=3 must be a mapping"),
        ({"data__train": [{"name": "a"}]}, "data.train[0].path is missing"),
        ({"data__train": [{**SOURCE, "wait": 3}]}, "data.train[0].wait is an unknown field"),
        ({"data__train": [{**SOURCE, "name": "a/b"}]}, "data.train[0].name='a/b' may contain only"),
        ({"data__train": [{**SOURCE, "cap": 2.5}]}, "data.train[0].cap=2.5 must be an integer"),
        ({"data__train": [{**SOURCE, "repeat": -1.0}]}, "data.train[0].repeat=-1.0"),
        ({"data__train": [{**SOURCE, "percent": 101}]}, "percent=101.0 must be at most 100"),
        (
            {"data__train": [{**SOURCE, "cap": 2, "weight": 1}]},
            "has weight=1.0, cap=2: set at most one",
        ),
        ({"data__train": [SOURCE, SOURCE]}, "data.train has 2 sources named 'a'"),
        (
            {"data__train": [SOURCE, {**SOURCE, "name": "b", "weight": 1}]},
            "data.train: b has a weight and a has none",
        ),
        ({"data__val": [{**SOURCE, "weight": 1}]}, "every validation sample is used exactly once"),
        ({"data__val": [{**SOURCE, "repeat": 2}]}, "every validation sample is used exactly once"),
        ({"data__rows": []}, "data.rows is empty"),
        ({"data__rows": [{"tokens": 0, "frames": 64}]}, "data.rows[0].tokens=0 must be positive"),
        (
            {"data__rows": [{"tokens": 9, "frames": 64}, {"tokens": 8, "frames": 64}]},
            "8 tokens and 64 frames must not be less than 9 and 64",
        ),
        ({"data__frames__time_text": "all"}, "data.frames.time_text='all' must be"),
        ({"data__frames__max_damage": 1.0}, "max_damage=1.0 must be below 1"),
        ({"data__frames__fps": -1}, "data.frames.fps=-1.0 must be at least 0"),
        ({"mesh__fsdp": -1}, "data=-1 and fsdp=-1"),
        ({"mesh__data": 0}, "data=0 and fsdp=1"),
        ({"mesh__tensor": 3}, "mesh.tensor=3 does not divide"),
        ({"mesh__context": 5}, "mesh.context=5 does not divide data.rows[0].tokens=384"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(changes, problem):
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, fields(**changes))
    assert problem in str(caught.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, fields(train__steps=0, model__dtype="x", data__nope=1))
    for name in ("train.steps", "dtype", "data.nope"):
        assert name in str(caught.value)


def test_a_missing_field_is_named():
    made = fields()
    del made["model"]["vision"]["patch_size"]
    with pytest.raises(ConfigError, match=r"model\.vision\.patch_size is missing"):
        from_dict(RunConfig, made)


def test_rates_that_are_all_zero_train_nothing():
    rates = {f"optim__learning_rate__{part}": 0.0 for part in ("vision", "projector", "decoder")}
    with pytest.raises(ConfigError, match="nothing would be trained"):
        from_dict(RunConfig, fields(**rates))


def test_differences_in_a_list_are_named_by_their_place():
    old = fields(data__train=[SOURCE, {**SOURCE, "name": "b"}])
    new = fields(data__train=[{**SOURCE, "path": "x"}])
    assert config_lib.differences(old, new) == {
        "data.train[0].path": ("a.json", "x"),
        "data.train[1]": ({**SOURCE, "name": "b"}, None),
    }


def test_differences_name_what_changed():
    old, new = fields(), fields(train__steps=7, model__mixer="none")
    assert config_lib.differences(old, new) == {
        "model.mixer": ("mamba1", "none"),
        "train.steps": (old["train"]["steps"], 7),
    }


def test_odd_grids_are_padded_by_the_pixel_shuffle():
    model = from_dict(ModelConfig, fields(model__vision__image_size=40)["model"])
    assert model.vision.side == 5
    assert model.side == 3
