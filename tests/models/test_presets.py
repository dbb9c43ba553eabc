"""Protects the full-size presets: sizes and constants of the published models, the projector's layout,
and configurations for every stage. Only shapes are made, nothing is allocated."""

from __future__ import annotations

import functools
import importlib

import jax
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from storm_jax.config import RunConfig, from_dict
from storm_jax.params import abstract_model, flat_params

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
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
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
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
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
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        ),
    ),
}
MODELS = {name: importlib.import_module(f"configs.{name}").MODEL for name in (*DECODERS, "tiny")}
IMAGE_SIZE = {"storm_qwen2_7b": 448, "storm_qwen2_1_5b": 384, "storm_llama3_8b": 384}
MILLIONS = {
    "storm_qwen2_7b": {"decoder": 7615.6, "vision": 413.3, "projector": 185.1},
    "storm_qwen2_1_5b": {"decoder": 1543.7, "vision": 413.0, "projector": 38.4},
    "storm_llama3_8b": {"decoder": 8030.3, "vision": 413.0, "projector": 238.8},
}


def torch_count(make, config) -> int:
    with torch.device("meta"):
        model = make(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(params=DECODERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def counts(name) -> dict[str, int]:
    return count_parts(name)


@functools.cache
def count_parts(name: str) -> dict[str, int]:
    shapes = flat_params(abstract_model(MODELS[name])[1])
    parts = dict.fromkeys(("vision", "projector", "decoder"), 0)
    for path, leaf in shapes.items():
        assert isinstance(leaf, jax.ShapeDtypeStruct), path
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


def test_parts_have_the_sizes_we_state(name, counts):
    assert {part: round(count / 1e6, 1) for part, count in counts.items()} == MILLIONS[name]


def test_constants_that_no_count_shows_are_the_published_ones(name):
    ours, theirs = MODELS[name].decoder, DECODERS[name][1]
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert (ours.num_heads, ours.num_kv_heads) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads


def test_projector_has_the_parameters_of_its_formula(name, counts):
    """Pixel shuffle by 2, Linear, 2 x (LayerNorm, Mamba both ways with E = 2 D, N = 16, K = 4)."""
    width = MODELS[name].decoder.width
    inner, state, taps, rank = 2 * width, 16, 4, -(-width // 16)
    direction = taps * inner + inner  # conv and its bias
    direction += inner * (rank + 2 * state) + rank * inner + inner  # x_proj, dt_proj and its bias
    direction += inner * state + inner  # A and D
    layer = 2 * width  # norm
    layer += width * 2 * inner + inner * width  # in_proj to x and z, out_proj
    layer += 2 * direction
    linear = 4 * 1152 * width + width
    assert counts["projector"] == linear + 2 * layer


@pytest.mark.parametrize("stage", ["align", "sft", "long"])
@pytest.mark.parametrize("preset", [*DECODERS, "tiny"])
def test_every_stage_of_every_preset_is_a_valid_configuration(preset, stage):
    module = importlib.import_module(f"configs.{preset}")
    config = from_dict(RunConfig, module.get_config(f"stage={stage}"))
    assert config.model == MODELS[preset]
    rates = config.optim.learning_rate
    assert rates.projector > 0
    assert (rates.vision == rates.decoder == 0) == (stage == "align")


@pytest.mark.parametrize("argument", [None, "", "sft", "stage=", "stage=pretrain"])
@pytest.mark.parametrize("preset", [*DECODERS, "tiny"])
def test_an_unknown_stage_is_refused_with_those_there_are(preset, argument):
    module = importlib.import_module(f"configs.{preset}")
    with pytest.raises(ValueError, match="align, sft, long"):
        module.get_config(argument)
