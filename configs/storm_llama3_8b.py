"""Llama-3-8B with SigLIP at 384 pixels, 196 tokens a frame; stages as in configs/storm_qwen2_7b.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.recipe import select_stage
from configs.storm_qwen2_7b import stages
from storm_jax.config import DecoderConfig, ModelConfig, VisionConfig

MODEL = ModelConfig(
    vision=VisionConfig(  # SigLIP-so400m/14
        image_size=384,
        patch_size=14,
        width=1152,
        depth=27,
        num_heads=16,
        mlp_dim=4304,
    ),
    decoder=DecoderConfig(  # Llama-3-8B
        vocab_size=128_256,
        width=4096,
        depth=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14_336,
        rope_theta=500_000.0,
        qkv_bias=False,
        tie_embeddings=False,
        norm_eps=1e-5,
        max_positions=8192,
    ),
)


def get_config(arg: str | None = None) -> ConfigDict:
    return select_stage(arg, stages(MODEL))
