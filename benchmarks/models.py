"""The models and compressions that benchmarks run, with random weights."""

from __future__ import annotations

import argparse

import jax

from configs import storm_llama3_8b, storm_qwen2_1_5b, storm_qwen2_7b
from storm_jax.config import (
    CompressionConfig,
    DecoderConfig,
    MambaConfig,
    ModelConfig,
    StemConfig,
    VisionConfig,
)
from storm_jax.params import abstract_model, compute_dtypes, flat_params, init_params

# For CPUs. It divides its FLOPs between vision, projector and decoder like the 7B model, within 10 % at 128 frames.
SMALL = ModelConfig(
    vision=VisionConfig(
        image_size=196,
        patch_size=14,
        width=320,
        depth=6,
        num_heads=5,
        mlp_dim=1184,
        feature_layer=-2,
    ),
    stem=StemConfig(kind="linear", downsample=2),
    mixer="mamba1",
    mamba=MambaConfig(depth=1, d_state=16, d_conv=4, expand=2, direction="both"),
    decoder=DecoderConfig(
        vocab_size=8192,
        width=512,
        depth=16,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=2560,
        rope_theta=1e6,
        qkv_bias=True,
        tie_embeddings=False,
        max_positions=131_072,
    ),
    dtype="float32",
)
PRESETS = {
    "storm_small": SMALL,
    "storm_qwen2_1_5b": storm_qwen2_1_5b.MODEL,
    "storm_qwen2_7b": storm_qwen2_7b.MODEL,
    "storm_llama3_8b": storm_llama3_8b.MODEL,
}
COMPRESSIONS = {
    "1x": CompressionConfig(num_frames=1),
    "4x": CompressionConfig(num_frames=1, temporal_pool=4),
    "8x": CompressionConfig(num_frames=1, temporal_pool=4, temporal_sample=2),
}
TEXT = 64  # tokens of a prompt, or of a row, that are not of its video


def random_params(config: ModelConfig) -> dict[str, jax.Array]:
    """Random parameters in the dtypes of the forward pass."""
    _, abstract = abstract_model(config)
    dtypes = compute_dtypes(flat_params(abstract), config)

    def make() -> dict[str, jax.Array]:
        params = init_params(config, seed=0)
        return {name: params[name].astype(leaf.dtype) for name, leaf in dtypes.items()}

    return jax.jit(make)()


def parse_numbers(text: str) -> tuple[int, ...]:
    """A value such as "4,8,16" on the command line."""
    return tuple(int(each) for each in text.split(","))


def parse_compressions(text: str) -> tuple[str, ...]:
    """A value such as "1x,4x" on the command line."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(COMPRESSIONS):
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: use some of {', '.join(COMPRESSIONS)}"
        )
    return names
