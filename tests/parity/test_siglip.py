"""Protects SigLIP: every layer equals transformers' torch tower with equal random weights, from uint8
frames on, whether or not patches cover the image and attention is cut into chunks of queries."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import SiglipVisionConfig, SiglipVisionModel

from storm_jax.config import VisionConfig
from storm_jax.models.siglip import SigLIP
from storm_jax.ops.attention import QUERY_CHUNK

MAX_ERROR = 1e-4
ODD_GRID = VisionConfig(
    image_size=42, patch_size=14, width=24, depth=3, num_heads=3, mlp_dim=40, feature_layer=-1
)  # 3 x 3 patches
CONFIGS = {
    "odd grid": ODD_GRID,
    "rest without a patch": dataclasses.replace(ODD_GRID, image_size=45),
    "two query chunks": dataclasses.replace(ODD_GRID, image_size=68, patch_size=4),
}
assert CONFIGS["two query chunks"].side ** 2 > QUERY_CHUNK


def to_torch(params: dict, config: VisionConfig) -> dict[str, np.ndarray]:
    """Our parameters under the torch tower's names."""
    layers = params["layers"]
    names = {
        "embeddings.patch_embedding.weight": params["patch"]["kernel"]
        .reshape(config.patch_size, config.patch_size, 3, -1)
        .transpose(3, 2, 0, 1),
        "embeddings.patch_embedding.bias": params["patch"]["bias"],
        "embeddings.position_embedding.weight": params["position"],
        "post_layernorm.weight": params["unused"]["norm"]["scale"],
        "post_layernorm.bias": params["unused"]["norm"]["bias"],
    }
    width = config.width
    for i in range(config.depth):
        prefix = f"encoder.layers.{i}."
        for ours, theirs in (("attn_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
            names[f"{prefix}{theirs}.weight"] = layers[ours]["scale"][i]
            names[f"{prefix}{theirs}.bias"] = layers[ours]["bias"][i]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            names[f"{prefix}self_attn.{theirs}.weight"] = (
                layers[ours]["kernel"][i].reshape(width, -1).T
            )
            names[f"{prefix}self_attn.{theirs}.bias"] = layers[ours]["bias"][i].reshape(-1)
        out = layers["out"]["kernel"][i].reshape(-1, width).T
        names[f"{prefix}self_attn.out_proj.weight"] = out
        names[f"{prefix}self_attn.out_proj.bias"] = layers["out"]["bias"][i]
        for ours, theirs in (("up", "fc1"), ("down", "fc2")):
            names[f"{prefix}mlp.{theirs}.weight"] = layers[ours]["kernel"][i].T
            names[f"{prefix}mlp.{theirs}.bias"] = layers[ours]["bias"][i]
    return names


def torch_tower(config: VisionConfig, params: dict) -> torch.nn.Module:
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.norm_eps,
            vision_use_head=False,
        )
    ).eval()
    names = to_torch(params, config)
    weights = {name: torch.from_numpy(np.array(value)) for name, value in names.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    if missing:  # some versions keep the tower under a prefix
        weights = {f"vision_model.{name}": value for name, value in weights.items()}
        missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert [name for name in missing if "position_ids" not in name] == []
    assert unexpected == []
    return theirs


@pytest.mark.parametrize("case", CONFIGS)
def test_every_layer_equals_transformers(case, randomise, rng):
    config = CONFIGS[case]
    ours = randomise(SigLIP(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False))
    params = jax.device_get(nnx.to_pure_dict(nnx.split(ours)[1]))
    theirs = torch_tower(config, params)
    frames = rng.integers(0, 256, (2, config.image_size, config.image_size, 3)).astype(np.uint8)
    pixels = torch.from_numpy((frames / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states
    assert len(expected) == config.depth + 1
    for layer in range(-config.depth, 0):
        tower = shallow(config, params, layer)
        found = nnx.jit(lambda tower: tower(frames))(tower)
        assert expected[layer].abs().max() > 0.5
        assert max_error(found, expected[layer]) <= MAX_ERROR, layer


def shallow(config: VisionConfig, params: dict, feature_layer: int) -> SigLIP:
    """The tower with another feature layer and the same weights."""
    config = dataclasses.replace(config, feature_layer=feature_layer)
    tower = SigLIP(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False)
    run = config.depth + 1 + feature_layer
    moved = {
        **params,
        "layers": jax.tree.map(lambda x: x[:run], params["layers"]),
        "unused": dict(params["unused"]),
    }
    if run < config.depth:
        moved["unused"]["layers"] = jax.tree.map(lambda x: x[run:], params["layers"])
    return nnx.merge(nnx.split(tower)[0], moved)


def max_error(found: jax.Array, expected: torch.Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(np.asarray(found) - expected.detach().numpy()).max())
