"""SigLIP against transformers' torch tower with equal random weights, layer by layer."""

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

MAX_ERROR = 1e-4
CONFIG = VisionConfig(
    image_size=45, patch_size=14, width=24, depth=3, num_heads=3, mlp_dim=40, feature_layer=-1
)  # 3 x 3 patches and a rest that no patch covers


def to_torch(params: dict) -> dict[str, np.ndarray]:
    """Our parameters under the torch tower's names."""
    layers = params["layers"]
    names = {
        "embeddings.patch_embedding.weight": params["patch"]["kernel"]
        .reshape(CONFIG.patch_size, CONFIG.patch_size, 3, -1)
        .transpose(3, 2, 0, 1),
        "embeddings.patch_embedding.bias": params["patch"]["bias"],
        "embeddings.position_embedding.weight": params["position"],
        "post_layernorm.weight": params["unused"]["norm"]["scale"],
        "post_layernorm.bias": params["unused"]["norm"]["bias"],
    }
    width = CONFIG.width
    for i in range(CONFIG.depth):
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


@pytest.fixture
def towers(randomise):
    ours = randomise(SigLIP(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False))
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=CONFIG.width,
            intermediate_size=CONFIG.mlp_dim,
            num_hidden_layers=CONFIG.depth,
            num_attention_heads=CONFIG.num_heads,
            image_size=CONFIG.image_size,
            patch_size=CONFIG.patch_size,
            layer_norm_eps=CONFIG.norm_eps,
            vision_use_head=False,
        )
    ).eval()
    params = jax.device_get(nnx.to_pure_dict(nnx.split(ours)[1]))
    weights = {name: torch.from_numpy(np.array(value)) for name, value in to_torch(params).items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    if missing:  # some versions keep the tower under a prefix
        weights = {f"vision_model.{name}": value for name, value in weights.items()}
        missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert [name for name in missing if "position_ids" not in name] == []
    assert unexpected == []
    return ours, theirs


def test_every_layer_equals_transformers(towers, rng):
    ours, theirs = towers
    frames = rng.integers(0, 256, (2, 45, 45, 3)).astype(np.uint8)
    pixels = torch.from_numpy((frames / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states
    params = nnx.split(ours)[1]
    for layer in range(-CONFIG.depth, 0):
        tower = shallow(nnx.to_pure_dict(params), layer)
        found = np.asarray(nnx.jit(lambda tower: tower(frames))(tower))
        error = np.abs(found - expected[layer].numpy()).max()
        assert np.abs(expected[layer].numpy()).max() > 0.5
        assert error <= MAX_ERROR, (layer, error)


def shallow(params: dict, feature_layer: int) -> SigLIP:
    """The tower with another feature layer and the same weights."""
    config = dataclasses.replace(CONFIG, feature_layer=feature_layer)
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
