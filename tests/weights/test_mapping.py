"""The table is one for both ways: every row goes there and back, and rows cover every parameter."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from configs.storm_llama3_8b import MODEL as LLAMA3_8B
from configs.storm_qwen2_1_5b import MODEL as QWEN2_1_5B
from configs.storm_qwen2_7b import MODEL as QWEN2_7B
from configs.tiny import MODEL as TINY
from storm_jax.config import LoraConfig
from storm_jax.params import abstract_model, flatten
from storm_jax.weights.mapping import Row, coverage_problems, tables


def shapes_of(model) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(nnx.to_pure_dict(abstract_model(model)[1]))


def rows_of(model) -> list[Row]:
    return [row for table in tables(model, shapes_of(model)).values() for row in table.rows]


MODELS = {
    "tiny": TINY,
    "mlp": dataclasses.replace(TINY, projector="mlp"),
    "own": dataclasses.replace(TINY, projector="reference_models:Mixer"),
    "one direction": dataclasses.replace(
        TINY, mamba=dataclasses.replace(TINY.mamba, direction="forward")
    ),
    "mamba2": dataclasses.replace(
        TINY, mamba=dataclasses.replace(TINY.mamba, mixer="mamba2", head_dim=16)
    ),
    "early features": dataclasses.replace(
        TINY, vision=dataclasses.replace(TINY.vision, depth=4, feature_layer=-3)
    ),
    "adapters": dataclasses.replace(
        TINY, decoder=dataclasses.replace(TINY.decoder, lora=LoraConfig(2))
    ),
    "qk norms": dataclasses.replace(
        TINY, decoder=dataclasses.replace(TINY.decoder, qk_norm=True, qkv_bias=False)
    ),
    "7b": QWEN2_7B,
    "1.5b": QWEN2_1_5B,
    "8b": LLAMA3_8B,
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_fill_every_parameter_once_and_names_are_unique(name):
    rows = rows_of(MODELS[name])
    assert coverage_problems(rows, shapes_of(MODELS[name])) == []
    for table in tables(MODELS[name], shapes_of(MODELS[name])).values():
        assert len({row.tensor for row in table.rows}) == len(table.rows)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("b")])
def test_every_row_goes_there_and_back(name):
    shapes = shapes_of(MODELS[name])
    for row in rows_of(MODELS[name]):
        shape = shapes[row.path].shape
        parameter = np.arange(np.prod(shape)).reshape(shape)
        tensor = row.to_theirs(parameter)
        assert tensor.shape == row.tensor_shape(shape)
        np.testing.assert_array_equal(row.to_ours(tensor), parameter[row.index])


def test_a_row_too_few_or_too_many_is_found():
    rows, shapes = rows_of(TINY), shapes_of(TINY)
    up = next(row for row in rows if row.tensor.endswith("1.mlp.up_proj.weight"))
    missing = coverage_problems([row for row in rows if row is not up], shapes)
    assert missing == ["decoder/layers/gate_up/kernel: 73,728 of 98,304 values are filled"]
    twice = [*rows, dataclasses.replace(up, tensor="again")]
    assert any("is filled 2 times" in problem for problem in coverage_problems(twice, shapes))
    stray = dataclasses.replace(up, path="decoder/nothing")
    assert "which the model lacks" in coverage_problems([*rows, stray], shapes)[0]
