"""The paper's main model (arXiv 2503.04130): SigLIP at 448 pixels, Qwen2-7B, 256 tokens a frame.

    python train.py --config=configs/storm_qwen2_7b.py:stage=align --workdir=runs/align --config.init_from=runs/base
    python train.py --config=configs/storm_qwen2_7b.py:stage=sft --workdir=runs/sft --config.init_from=runs/align
    python train.py --config=configs/storm_qwen2_7b.py:stage=long --workdir=runs/long --config.init_from=runs/sft

The paper gives the stages, the data and the number of frames. Learning rates and warmup come from VILA, which it
builds on (docs/design.md, "What the paper leaves open"). So does the batch of `SETUPS`, which are for three machines:

    python train.py --config=configs/storm_qwen2_7b.py:stage=long,on=v5p:4x4x8 --workdir=runs/long --config.init_from=runs/sft
"""

from __future__ import annotations

import functools

from ml_collections import ConfigDict

from configs.mixtures import align as align_mixture
from configs.mixtures import long as long_mixture
from configs.mixtures import sft as sft_mixture
from configs.mixtures import sources
from configs.recipe import BUDGETS, Setup, Stages, select_stage
from storm_jax.config import (
    CompressionConfig,
    DataConfig,
    DecoderConfig,
    LearningRateConfig,
    MambaConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RowConfig,
    RunConfig,
    StemConfig,
    TrainConfig,
    VisionConfig,
)

MODEL = ModelConfig(
    vision=VisionConfig(  # PaliGemma's SigLIP-so400m/14
        image_size=448,
        patch_size=14,
        width=1152,
        depth=27,
        num_heads=16,
        mlp_dim=4304,
        feature_layer=-2,
    ),
    stem=StemConfig(kind="linear", downsample=2),
    mixer="mamba1",
    mamba=MambaConfig(depth=2, d_state=16, d_conv=4, expand=2, direction="both"),
    decoder=DecoderConfig(  # Qwen2-7B
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
    dtype="bfloat16",
)

# Mesh and microbatches that fit (docs/preflight.md). A step has 2048 rows, which hold one or more samples each.
SETUPS = {
    "v5p:4x4x8": Setup(MeshConfig(data=4, fsdp=32), batch_size=2048, accumulation=16),
    "v5e:16x16": Setup(MeshConfig(data=2, fsdp=128), batch_size=2048, accumulation=8),
    "cuda:h200x8": Setup(MeshConfig(data=1, fsdp=8), batch_size=2048, accumulation=256),
}


def align(model: ModelConfig) -> RunConfig:
    """Stage 1: train the projector on image-text pairs."""
    return RunConfig(
        model=model,
        compression=CompressionConfig(num_frames=32, temporal_pool=4),
        data=DataConfig(
            train=sources(align_mixture.SETS),  # LLaVA-CC3M-Pretrain, 595K pairs
            rows=(RowConfig(tokens=8192, frames=32),),
        ),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(vision=0.0, projector=1e-3, decoder=0.0),
            warmup_fraction=0.03,
            weight_decay=0.0,
        ),
        train=TrainConfig(steps=1000, batch_size=256),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def sft(model: ModelConfig) -> RunConfig:
    """Stage 2: train everything on text, images and videos of 32 frames."""
    return RunConfig(
        model=model,
        compression=CompressionConfig(num_frames=32, temporal_pool=4),
        data=DataConfig(
            train=sources(sft_mixture.SETS),  # Table 8: 39 public sets, 12.5M samples
            rows=(
                RowConfig(tokens=8192, frames=16),  # mostly text, a few images
                RowConfig(tokens=8192, frames=64),  # many images, or two videos
            ),
        ),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(vision=2e-5, projector=2e-5, decoder=2e-5),
            warmup_fraction=0.03,
            weight_decay=0.0,
        ),
        train=TrainConfig(steps=10_000, batch_size=256, compressions=BUDGETS),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def long(model: ModelConfig) -> RunConfig:
    """Stage 3: train everything on videos of 128 frames."""
    return RunConfig(
        model=model,
        compression=CompressionConfig(num_frames=128, temporal_pool=4),
        data=DataConfig(
            train=sources(long_mixture.SETS),  # LLaVA-Video, 1.35M samples
            rows=(RowConfig(tokens=16_384, frames=128),),
        ),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(vision=2e-5, projector=2e-5, decoder=2e-5),
            warmup_fraction=0.03,
            weight_decay=0.0,
        ),
        train=TrainConfig(steps=10_000, batch_size=256, compressions=BUDGETS),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def stages(model: ModelConfig) -> Stages:
    """The paper's three stages for a model of any size."""
    return {stage.__name__: functools.partial(stage, model) for stage in (align, sft, long)}


def get_config(arg: str | None = None) -> ConfigDict:
    return select_stage(arg, stages(MODEL), SETUPS)
