"""The full-size presets have the published models' sizes; only shapes are made, nothing is allocated."""

from __future__ import annotations

import importlib

import pytest
import torch
from flax import nnx
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from storm_jax import presets
from storm_jax.config import RunConfig, from_dict
from storm_jax.run import abstract_model, flatten

# The published config.json of Qwen/Qwen2-7B, Qwen/Qwen2-1.5B and meta-llama/Meta-Llama-3-8B.
DECODERS = {
    "storm_qwen2_7b": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
    ),
    "storm_qwen2_1_5b": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "storm_llama3_8b": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        ),
    ),
}
IMAGE_SIZE = {"storm_qwen2_7b": 448, "storm_qwen2_1_5b": 384, "storm_llama3_8b": 384}


def torch_count(make, config) -> int:
    with torch.device("meta"):
        model = make(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(params=DECODERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def counts(name) -> dict[str, int]:
    shapes = flatten(nnx.to_pure_dict(abstract_model(getattr(presets, name)())[1]))
    parts = dict.fromkeys(("vision", "projector", "decoder"), 0)
    for path, leaf in shapes.items():
        parts[path.split("/")[0]] += leaf.size
    return parts


def test_decoder_and_tower_have_as_many_parameters_as_transformers(name, counts):
    assert counts["decoder"] == torch_count(*DECODERS[name])
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=IMAGE_SIZE[name],
        patch_size=14,
        vision_use_head=False,
    )
    assert counts["vision"] == torch_count(SiglipVisionModel, tower)


def test_projector_has_the_parameters_of_its_formula(name, counts):
    width = getattr(presets, name)().decoder.width
    inner, state, rank = 2 * width, 16, -(-width // 16)
    direction = 4 * inner + inner  # conv and its bias
    direction += inner * (rank + 2 * state) + rank * inner + inner  # x_proj, dt_proj and its bias
    direction += inner * state + inner  # A and D
    layer = 2 * width + 2 * width * inner + inner * width + 2 * direction
    linear = 4 * 1152 * width + width
    assert counts["projector"] == linear + 2 * layer


@pytest.mark.parametrize("stage", ["align", "sft", "long"])
@pytest.mark.parametrize("preset", [*DECODERS, "tiny"])
def test_every_stage_of_every_preset_is_a_valid_configuration(preset, stage):
    module = importlib.import_module(f"configs.{preset}")
    config = from_dict(RunConfig, module.get_config(f"stage={stage}"))
    assert config.model == getattr(presets, preset)()
    rates = config.optim.learning_rate
    assert rates.projector > 0
    assert (rates.vision == rates.decoder == 0) == (stage == "align")


@pytest.mark.parametrize("argument", [None, "", "sft", "stage=", "stage=pretrain"])
def test_an_unknown_stage_is_refused_with_those_there_are(argument):
    from configs import tiny

    with pytest.raises(ValueError, match="align, sft, long"):
        tiny.get_config(argument)
