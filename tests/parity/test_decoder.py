"""The decoder: every layer and the logits equal transformers' Qwen2, Llama and Qwen3 with the same random
weights, with tied and untied embeddings, and with several query chunks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from flax.traverse_util import flatten_dict

from benchmarks.torch_models import torch_decoder
from storm_jax.config import DecoderConfig, RopeScalingConfig
from storm_jax.models.decoder import Decoder
from storm_jax.ops.attention.xla import BLOCK

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
LONG = BLOCK + 44
FAMILIES = {
    "qwen2": QWEN2,
    "qwen2_tied": dataclasses.replace(QWEN2, tie_embeddings=True),
    "llama": dataclasses.replace(QWEN2, qkv_bias=False, rope_theta=5e5, norm_eps=1e-5),
    "llama_3.1": dataclasses.replace(
        QWEN2,
        qkv_bias=False,
        rope_theta=100.0,
        rope_scaling=RopeScalingConfig(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=64
        ),
    ),  # its 4 frequencies are unchanged, interpolated and scaled
    "qwen3": dataclasses.replace(QWEN2, qkv_bias=False, qk_norm=True),
}


def abstract_decoder(config: DecoderConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False))


@pytest.mark.parametrize("length", [1, 37, LONG], ids=["one", "short", "two query chunks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_the_logits_equal_transformers(family, length, randomise, rng):
    config = FAMILIES[family]
    model = randomise(abstract_decoder(config))
    params = nnx.to_pure_dict(nnx.split(model)[1])
    tokens = rng.integers(0, config.vocab_size, (2, length))
    theirs = torch_decoder(config, flatten_dict({"decoder": jax.device_get(params)}, sep="/"))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens), output_hidden_states=True)
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    for depth in range(1, config.depth + 1):
        part = dataclasses.replace(config, depth=depth)
        shallow = abstract_decoder(part)
        layers = jax.tree.map(lambda x, depth=depth: x[:depth], params["layers"])
        shallow = nnx.merge(nnx.split(shallow)[0], {**params, "layers": layers})
        hidden, _ = nnx.jit(lambda m: m(m.embed(tokens), positions))(shallow)
        after = expected.hidden_states[depth]
        if depth < config.depth:  # transformers normalises only the last one
            with torch.no_grad():
                after = theirs.model.norm(after)
        assert max_error(hidden, after) <= MAX_ERROR, depth
    assert expected.logits.abs().max() > 0.5
    assert max_error(hidden @ model.head(), expected.logits) <= MAX_ERROR


def max_error(found: jax.Array, expected: torch.Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(np.asarray(found) - expected.detach().numpy()).max())
