"""Models by name: `tiny` for a laptop, and the three of the paper's Table 6 at full size."""

from __future__ import annotations

from storm_jax.config import DecoderConfig, MambaConfig, ModelConfig, VisionConfig


def tiny() -> ModelConfig:
    """Learns the built-in task on two CPU cores in minutes: 32 x 32 frames, 4 tokens each."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=32,
            patch_size=8,
            width=64,
            depth=2,
            num_heads=4,
            mlp_dim=256,
            feature_layer=-1,
        ),
        mamba=MambaConfig(d_state=8),
        decoder=DecoderConfig(
            vocab_size=512,
            width=96,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            mlp_dim=256,
            rope_theta=10_000.0,
            qkv_bias=True,
            tie_embeddings=True,
        ),
        dtype="float32",
    )


def storm_qwen2_7b() -> ModelConfig:
    """The paper's main model: PaliGemma's SigLIP at 448, 256 tokens a frame, Qwen2-7B."""
    return ModelConfig(
        vision=_so400m(448),
        decoder=DecoderConfig(
            vocab_size=152_064,
            width=3584,
            depth=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            mlp_dim=18_944,
            rope_theta=1_000_000.0,
            qkv_bias=True,
            tie_embeddings=False,
            max_positions=131_072,
        ),
    )


def storm_qwen2_1_5b() -> ModelConfig:
    """Qwen2-1.5B with SigLIP at 384: 14 x 14 tokens a frame."""
    return ModelConfig(
        vision=_so400m(384),
        decoder=DecoderConfig(
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


def storm_llama3_8b() -> ModelConfig:
    """Llama-3-8B with SigLIP at 384: 14 x 14 tokens a frame."""
    return ModelConfig(
        vision=_so400m(384),
        decoder=DecoderConfig(
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


def _so400m(image_size: int) -> VisionConfig:
    return VisionConfig(
        image_size=image_size, patch_size=14, width=1152, depth=27, num_heads=16, mlp_dim=4304
    )
