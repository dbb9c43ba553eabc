"""One table for import and export: rules are invertible and cover every parameter."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from configs.storm_llama3_8b import MODEL as LLAMA3_8B
from configs.storm_qwen2_1_5b import MODEL as QWEN2_1_5B
from configs.storm_qwen2_7b import MODEL as QWEN2_7B
from configs.tiny import MODEL as TINY
from storm_jax.config import LoraConfig, StemConfig
from storm_jax.params import abstract_model, flat_params
from storm_jax.weights.mapping import TensorRule, coverage_problems, tables


def shapes_of(model) -> dict[str, jax.ShapeDtypeStruct]:
    return flat_params(abstract_model(model)[1])


def rules_of(model) -> list[TensorRule]:
    return [rule for table in tables(model, shapes_of(model)).values() for rule in table.rules]


MODELS = {
    "tiny": TINY,
    "no mixer": dataclasses.replace(TINY, mixer="none"),
    "final norm": dataclasses.replace(
        TINY, vision=dataclasses.replace(TINY.vision, feature_layer=-1, final_norm=True)
    ),
    "linear, no bias": dataclasses.replace(TINY, stem=StemConfig(bias=False)),
    "mlp2x_gelu": dataclasses.replace(TINY, stem=StemConfig(kind="mlp2x_gelu", downsample=1)),
    "mlp_downsample": dataclasses.replace(TINY, stem=StemConfig(kind="mlp_downsample")),
    "mlp_downsample_3x3_fix": dataclasses.replace(
        TINY, stem=StemConfig(kind="mlp_downsample_3x3_fix", downsample=3)
    ),
    "own": dataclasses.replace(TINY, mixer="reference_models:Mixer"),
    "one direction": dataclasses.replace(
        TINY, mamba=dataclasses.replace(TINY.mamba, direction="forward")
    ),
    "mamba2": dataclasses.replace(
        TINY, mixer="mamba2", mamba=dataclasses.replace(TINY.mamba, head_dim=16)
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
def test_rules_fill_every_parameter_once_with_unique_names(name):
    rules = rules_of(MODELS[name])
    assert coverage_problems(rules, shapes_of(MODELS[name])) == []
    for table in tables(MODELS[name], shapes_of(MODELS[name])).values():
        assert len({rule.tensor for rule in table.rules}) == len(table.rules)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("b")])
def test_every_rule_is_its_own_inverse(name):
    shapes = shapes_of(MODELS[name])
    for rule in rules_of(MODELS[name]):
        shape = shapes[rule.path].shape
        parameter = np.arange(np.prod(shape)).reshape(shape)
        tensor = rule.to_tensor(parameter)
        assert tensor.shape == rule.tensor_shape(shape)
        np.testing.assert_array_equal(rule.to_parameter(tensor), parameter[rule.index])


def test_missing_and_duplicate_rules_are_found():
    rules, shapes = rules_of(TINY), shapes_of(TINY)
    up = next(rule for rule in rules if rule.tensor.endswith("1.mlp.up_proj.weight"))
    missing = coverage_problems([rule for rule in rules if rule is not up], shapes)
    assert missing == ["decoder/layers/gate_up/kernel: 73,728 of 98,304 values are filled"]
    twice = [*rules, dataclasses.replace(up, tensor="again")]
    assert any("is filled 2 times" in problem for problem in coverage_problems(twice, shapes))
    stray = dataclasses.replace(up, path="decoder/nothing")
    assert "which the model does not have" in coverage_problems([*rules, stray], shapes)[0]
