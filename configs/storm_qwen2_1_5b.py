"""Qwen2-1.5B with SigLIP at 384 pixels, 196 tokens a frame; stages as in configs/storm_qwen2_7b.py."""

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
    decoder=DecoderConfig(  # Qwen2-1.5B
        vocab_size=151_936,
        width=1536,
        depth=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_dim=8960,
        rope_theta=1_000_000.0,
        qkv_bias=True,
        tie_embeddings=True,
        max_positions=131_072,
    ),
)


def get_config(arg: str | None = None) -> ConfigDict:
    return select_stage(arg, stages(MODEL))
