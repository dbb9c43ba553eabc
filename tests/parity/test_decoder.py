"""Protects the decoder: every layer and the logits equal transformers' Qwen2 and Llama with equal
random weights, with tied and untied embeddings, also where attention is cut into query chunks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from storm_jax.config import DecoderConfig
from storm_jax.models.decoder import Decoder
from storm_jax.ops.attention import QUERY_CHUNK

MAX_ERROR = 1e-4
QWEN2 = DecoderConfig(
    vocab_size=97,
    width=36,
    depth=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    rope_theta=1e6,
    qkv_bias=True,
    tie_embeddings=False,
)  # width, heads, query heads per key head and head_dim all differ
LONG = QUERY_CHUNK + 44
FAMILIES = {
    "qwen2": QWEN2,
    "qwen2_tied": dataclasses.replace(QWEN2, tie_embeddings=True),
    "llama": dataclasses.replace(QWEN2, qkv_bias=False, rope_theta=5e5, norm_eps=1e-5),
}


def to_torch(params: dict, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Our parameters under transformers' names."""
    layers, width = params["layers"], config.width
    names = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["norm"]["scale"],
        "lm_head.weight": params["embedding"] if config.tie_embeddings else params["lm_head"].T,
    }
    for i in range(config.depth):
        prefix = f"model.layers.{i}."
        names[f"{prefix}input_layernorm.weight"] = layers["attn_norm"]["scale"][i]
        names[f"{prefix}post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            kernel = layers[ours]["kernel"][i].reshape(width, -1).T
            names[f"{prefix}self_attn.{theirs}.weight"] = kernel
            if config.qkv_bias:
                names[f"{prefix}self_attn.{theirs}.bias"] = layers[ours]["bias"][i].reshape(-1)
        names[f"{prefix}self_attn.o_proj.weight"] = layers["out"]["kernel"][i].reshape(-1, width).T
        names[f"{prefix}mlp.gate_proj.weight"] = layers["gate_up"]["kernel"][i][:, 0].T
        names[f"{prefix}mlp.up_proj.weight"] = layers["gate_up"]["kernel"][i][:, 1].T
        names[f"{prefix}mlp.down_proj.weight"] = layers["down"]["kernel"][i].T
    return names


def torch_decoder(config: DecoderConfig, params: dict) -> torch.nn.Module:
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": 512,
    }
    if config.qkv_bias:
        model = Qwen2ForCausalLM(Qwen2Config(**fields))
    else:
        model = LlamaForCausalLM(LlamaConfig(**fields, attention_bias=False))
    weights = to_torch(params, config)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == ([], [])
    return model.eval()


@pytest.mark.parametrize("length", [1, 37, LONG], ids=["one", "short", "two query chunks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_the_logits_equal_transformers(family, length, randomise, rng):
    config = FAMILIES[family]
    model = randomise(Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False))
    params = nnx.to_pure_dict(nnx.split(model)[1])
    tokens = rng.integers(0, config.vocab_size, (2, length))
    theirs = torch_decoder(config, jax.device_get(params))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens), output_hidden_states=True)
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    for depth in range(1, config.depth + 1):
        part = dataclasses.replace(config, depth=depth)
        shallow = Decoder(part, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False)
        cut = {**params, "layers": jax.tree.map(lambda x, depth=depth: x[:depth], params["layers"])}
        shallow = nnx.merge(nnx.split(shallow)[0], cut)
        hidden, _ = nnx.jit(lambda m: m(m.embed(tokens), positions))(shallow)
        after = expected.hidden_states[depth]
        if depth < config.depth:  # transformers normalises the last one only
            with torch.no_grad():
                after = theirs.model.norm(after)
        assert max_error(hidden, after) <= MAX_ERROR, depth
    assert expected.logits.abs().max() > 0.5
    assert max_error(hidden @ model.head(), expected.logits) <= MAX_ERROR


def max_error(found: jax.Array, expected: torch.Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(np.asarray(found) - expected.detach().numpy()).max())
